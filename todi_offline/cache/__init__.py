"""The cache: sparse teacher targets at rest. numpy, pyarrow and zarr only, never torch.

Read in this order:

    layout       which arrays there are, on which axis, of which dtype and codec; the history of the format
    encoding     log-probs <-> stored numbers
    fingerprint  what identifies a tokenizer, a sequence, a piece of metadata
    manifest     what the cache says of itself
    narrow       rows that hold much -> rows that hold less
    plan         which sequence lies in which shard, decided before the teacher runs
    store        where objects lie: whole or not there; the lock
    commit       sums of objects, commit records, the seal
    writer       rows -> shards
    shard        one Zarr shard file -> decoded rows, read directly
    reader       shards -> sequences
    invariants   decoded rows -> what cannot be true of them
    verify       a cache -> everything that is wrong with it
"""
