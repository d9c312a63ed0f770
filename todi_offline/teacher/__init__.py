"""Examples in, the teacher's targets at their supervised positions out.

in_transformers   batches of examples, run by transformers
in_vllm           examples, run by vLLM: messages to its workers, and the step that they take
"""
