"""A run, from a Config to result.json.

state              `Run`: the parts of a run, complete, built once
assemble           makes a `Run` of a Config and a Backend
factories          calls the factories of a Config
step_checks        checks what the functions of a config give to each other in a step
value_checks       checks the values that a forward returns beside the loss
slot_results       the results that the step body takes from each slot of a step
train_metrics      metrics of the training data, over the steps from one log point to the next
field_places       the line of a field's value in the user's files
code_errors        explains an exception of the user's code in one line
data               training data with its loader and identity, and validation data
updates            around each update: gradient norm, clipping, schedule, updates that are left out
freezing           the parameters that are trained, and the groups of the optimizer, while both change
train              the way of a run: assemble, restore, attach, train, result
resume             the state that a checkpoint holds of a run, and how a run resumes from one
checkpoint_places  the places of a run's checkpoints
saving             when and where a checkpoint is saved, also when little time is left
samples            compares a few samples between the ranks, and with the run's own
restored           checks that what was restored is what was saved
rollback           going back to a checkpoint after a bad step
evaluation         the model over the validation data, on all ranks
validation         the evaluation that a run does after a step
reporter           ledger, curves and display, fed together
handler_state      state that handlers hold and no checkpoint holds
directory          the run directory: its files and its lock
opening            locks the run directory before anything is built, and opens it afterwards
result             reads result.json
note_launch        keeps each launch, and says what has changed since
launches           the launches that a run directory keeps
source_files       the cfg.py and the modules of a launch, versions, the git commit
launch_changes     the differences between two launches
built_values       new values of optimizer and schedule, which a checkpoint's replace
rank_log           the log file of a rank
"""
