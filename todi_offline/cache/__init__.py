"""The cache: sparse teacher targets at rest. numpy, pyarrow and zarr only, never torch.

Read in this order:

    layout       which arrays there are, on which axis, of which dtype and codec; the history of the format
    encoding     log-probs <-> stored numbers
    fingerprint  what identifies a tokenizer, a sequence, a piece of metadata
    manifest     what the cache says of itself
    narrow       rows that hold much -> rows that hold less
    plan         which sequence lies in which shard, decided before the teacher runs
    store        where objects lie: whole or not there; the lock
    remote       the same below a URL
    staging      local copies of what lies there
    commit       sums of objects, commit records, the seal
    appending    what a cache holds, and a data set -> what is still to be captured
    writer       rows -> shards
    shard        one Zarr shard file -> decoded rows, read directly
    reader       shards -> sequences
    view         several caches, or a part of one -> what reads like one
    reuse        what earlier caches hold -> rows of a new one
    invariants   decoded rows -> what cannot be true of them
    verify       a cache -> everything that is wrong with it
    repair       a damaged cache -> one without what is damaged
    merge        caches -> one of all their sequences
    subset       a cache -> some of its sequences, with less of each, or stored otherwise
    export       a cache -> a Parquet table
    importing    a Parquet table -> a cache
    tokenizer_files  a folder -> as much of a tokenizer as its fingerprint needs
"""
