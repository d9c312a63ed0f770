"""The cache: sparse teacher targets at rest. numpy, pyarrow and zarr only, never torch. README.md specifies the format.

Rooms, and in each the order in which to read:

    format/     the bytes of a cache, without input or output: names, keys, layout, rows, encoding, sequences,
                codecs, shard, records, notes, manifest, root, version_1; fingerprint and narrow
    store/      the place of a cache, a folder or a URL: base, local, locks, remote, staging

    objects         a store -> its objects, parsed and compared with their sums
    fetching        tasks on the objects of a store -> their results; many at once in an object store
    shard_file      one Zarr shard file -> decoded rows
    stored          one cache -> its sequences
    reader          caches, or a part of one -> sequences in any order: `open_cache`, `union`, `select`, `read_all`

    planning        a data set and the sequences of its cache -> the shards to capture
    shard_writer    rows -> one committed shard, in any process
    writer          a plan -> a cache: lock, begin, seal
    reuse           earlier caches -> rows of a new one

    check/      a cache -> the problems that it has: invariants, problems, contents, verify, repair; diff, summary
    convert/    caches and tables -> other caches and tables: subset, merge, export, importing, and their helpers
"""
