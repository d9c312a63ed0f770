"""Names of models in, loaded models and what is known of them out.

loading      a folder, hub id or GGUF file -> model and tokenizer
checkpoint   the files of a checkpoint -> what identifies it
head         a model -> where its head runs, and how it is chunked
"""
