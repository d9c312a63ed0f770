"""Names of codecs in, numcodecs objects and metadata for readers of Zarr out."""

import json
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from todi_offline.cache.format.layout import ArraySpec

PCODEC_LEVEL = 8


def blosc_options(codec: str, dtype: np.dtype[np.generic]) -> dict[str, Any]:
    """Return the options of blosc for arrays of this dtype; none where pcodec is used, which takes no single bytes."""
    if codec == "compact" and dtype.itemsize > 1:
        return {}
    shuffle = "shuffle" if dtype.itemsize > 1 else "noshuffle"
    return {"cname": "lz4" if codec == "fast" else "zstd", "clevel": 5, "shuffle": shuffle}


def codec_name(dtype: np.dtype[np.generic], codec: str) -> str:
    """Return the name of the codec that compresses arrays of this dtype."""
    options = blosc_options(codec, dtype)
    return f"blosc-{options['cname']}" if options else "pcodec"


@lru_cache(maxsize=16)
def chunk_codec(codec: str, dtype: np.dtype[np.generic]) -> Any:
    """Return the numcodecs codec of an inner chunk."""
    from numcodecs import Blosc
    from numcodecs.pcodec import PCodec

    options = blosc_options(codec, dtype)
    if not options:
        return PCodec(level=PCODEC_LEVEL)
    return Blosc(options["cname"], options["clevel"], Blosc.SHUFFLE if options["shuffle"] == "shuffle" else 0)


@lru_cache(maxsize=64)
def array_metadata(spec: ArraySpec, codec: str, num_shards: int) -> bytes:
    """Return the `zarr.json` of an array, as zarr-python writes it."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec
    from zarr.codecs.numcodecs import PCodec

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        options = blosc_options(codec, spec.dtype)
        array = zarr.create_array(
            zarr.storage.MemoryStore(),
            shape=spec.shape(num_shards * spec.shard_rows),
            shards=spec.shape(spec.shard_rows),
            chunks=spec.shape(spec.chunk_rows),
            dtype=spec.dtype,
            fill_value=0,
            filters=None,
            serializer="auto" if options else PCodec(level=PCODEC_LEVEL),
            compressors=[*([BloscCodec(**options)] if options else []), Crc32cCodec()],
        )
        return (json.dumps(array.metadata.to_dict(), indent=1, default=str) + "\n").encode()


def group_metadata(attributes: Mapping[str, Any], arrays: Mapping[str, bytes]) -> bytes:
    """Return the `zarr.json` of the group.

    It holds the metadata of the arrays too (consolidated), so that zarr-python lists them without walking the folder,
    where it would warn of every object that is no array.
    """
    metadata = {name: json.loads(data) for name, data in arrays.items()}
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": dict(attributes),
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata},
    }
    return (json.dumps(group, separators=(",", ":")) + "\n").encode()
