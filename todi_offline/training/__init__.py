"""Stage 2: a cache and a student in, a trained student out.

run         what `train` does; its settings
recipes     the settings of the paper's scripts
arguments   transformers' TrainingArguments -> those that this trainer honours, or a refusal
folder      the folder of a run -> where to begin, and what to keep
stream      a cache -> packed batches
probes      a model and a few tokens -> its head, and how batches are put together
first_rank  a question -> the answer of the first process, on all of them
trainer     ToDiTrainer
meters      sums over batches -> what is logged
log         what is logged -> a row on the terminal
"""
