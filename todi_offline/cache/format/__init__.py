"""The bytes of a cache, without input or output: names, keys, layout, rows, encoding, shard, records, notes, root."""
