"""A run, from a Config to result.json.

state              `Run`: the parts of a run, complete, built once
length             the length that a config asks for, and its steps
assemble           makes a `Run` of a Config and a Backend
factories          calls the factories of a Config
builders           builds the model, the optimizer and the schedule by them
optimizer_checks   refuses an optimizer that a run cannot step, save or shard
step_checks        checks what the functions of a config give to each other in a step
value_checks       checks the values that a forward returns beside the loss
global_loss        training and evaluation with a loss over the samples of a whole global batch
data               training data with its loader and identity, and validation data
samples            compares a few samples between the ranks, and with the run's own
beginning          whether a run begins anew, and the file that says with which weights
initial_weights    takes the weights of `init_from` into the model
weight_names       pairs the names of stored weights with those of a model
weight_source      finds and reads the weights that `init_from` names
updates            around each update: gradient norm, clipping, schedule, updates that are left out
several_updates    several updates in a step, each for its own parameters
updates_together   the results and the outcome of several updates, as those of one
stepping           builds the engine's step, with one update or several
freezing           the parameters that are trained, and the groups of the optimizer, while both change
frozen_weights     frozen weights that checkpoints leave out
pretrained         describes models of transformers, for checkpoints and exports
module_settings    plain attributes of modules that handlers change
ema                the moving average of the weights
evaluation_point   the parameters of an optimizer that evaluates at another point than it trains at
train              the way of a run: assemble, restore, attach, train, result
audit              the audited steps: faults are named, and a step is done again
slot_results       the results that the step body takes from each slot of a step
train_metrics      metrics of the training data, over the steps from one log point to the next
measures           builds the evaluations, and the metrics of the training and validation data
evaluation         the model over the validation data, on all ranks
validation_sets    several sets of validation data, evaluated as one
validation         the evaluation that a run does after a step
monitors           builds the memory of the best evaluation, and the rule that ends a run early
evaluated          the newest evaluation, for what follows evaluations
reporter           ledger, curves and display, fed together
outcome            the content of result.json
result             reads result.json
resume             the state that a checkpoint holds of a run, and how a run resumes from one
restored           checks that what was restored is what was saved
built_values       new values of optimizer and schedule, which a checkpoint's replace
handler_state      state that handlers hold and no checkpoint holds
rollback           going back to a checkpoint after a bad step
tensor_memory      the bytes of the tensors that come and go while code runs
memory_table       the memory that a rank needs, in rows, and what to set
memory_trial       two steps of a run, to measure it
memory_shortage    a run that does not fit, before its first step or when it dies
saving             when and where a checkpoint is saved, also when little time is left
checkpoint_places  the places of a run's checkpoints
checkpoint_target  finds the checkpoints that a person names
checkpoint_values  the values of one checkpoint on the validation data
directory          the run directory: its files and its lock
opening            locks the run directory before anything is built, and opens it afterwards
past_runs          reads what the run directories of a folder say of their runs
note_launch        keeps each launch, and says what has changed since
launches           the launches that a run directory keeps
source_files       the cfg.py and the modules of a launch, versions, the git commit
launch_changes     the differences between two launches
replay             computes a step of a run again in one process, proven by the ledger
mismatch           the error for a replayed step that is not the run's
replay_start       the checkpoint from which a step is computed again
replayed_slots     the slots of a replayed step
slot_debugger      opens a debugger before the model is called on a slot
kept_code          imports the modules of a past launch as the run keeps them
rank_log           the log file of a rank
field_places       the line of a field's value in the user's files
code_errors        explains an exception of the user's code in one line
"""
