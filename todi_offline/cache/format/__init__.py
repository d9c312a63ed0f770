"""What is on the disk, without touching it: names, keys, layout, rows, encoding, sequences, codecs, shard, root."""
