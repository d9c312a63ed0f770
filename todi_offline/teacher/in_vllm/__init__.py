"""A teacher that vLLM serves: examples in, targets out that were computed inside vLLM's workers from their logits.

messages.py   examples, settings and rows <-> plain values that may travel between the processes of an engine
steps.py      the hidden states of one step of the engine -> targets; knows nothing of vLLM
runners.py    the batches of vLLM's model runners -> the spans that a step reads; the private names of vLLM
worker.py     what vLLM adds to its workers
watchdog.py   a call -> its result, or an error after a time without a sign of life
processes.py  the processes that an engine has started -> their end, where the engine does not answer
client.py     examples -> targets, in the process that holds the engine

Nothing here imports vLLM before an engine is started.
"""
