"""The commands that a person types.

main         `disttrain COMMAND`: runs the command of that name
launch       `python -m disttrain.launch cfg.py`: trains a config, and reports errors once
start_ranks  `disttrain launch --ranks N`: starts the ranks of this host by torchrun
summary      prints the first line of a run, and the summary at its end
verify       runs a config killed and resized, and compares every bit
verification runs the lives of a scenario, for `verify`
scenarios    plans the runs of `verify`
attacks      gives each life other settings of its process, for `verify`
causes       finds the setting because of which a scenario differs or cannot be run, for `verify`
lost_state   finds the state of handlers that a kill loses, for `verify`
compare      finds the first difference of two runs
runs         lists the runs of a folder, what differs in their configs, and their results
checkpoint   lists, shows, verifies and prunes checkpoints
export       writes the weights of a run for other programs
evaluate     evaluates a checkpoint of a run on its validation data
launchers    lists and copies the launchers that are installed with the package
replay       computes a step of a run again, and shows it slot by slot
replay_report prints a replayed step
replayed_code the code with which a step is replayed
bisect       finds the first step and module that other code computes otherwise
bisect_sides computes the two sides of a bisection
doctor       prints the versions and devices of this machine
closed_output  drops what nobody reads any more
failures     reports the error that ended a run, once for all ranks
exit_codes   defines the exit codes of all commands

launch    one start of a run's ranks; torchrun may restart them within it
scenario  a whole run of a verification, in one or more lives
life      one process group of a scenario, which ends by a kill or with the run
"""
