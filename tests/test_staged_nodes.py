"""Two nodes train from one cache in an object store: each keeps copies of its own, of what it reads and no more."""

import faulthandler
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from conftest import Row, tokenised
from support.object_store import Proxy, s3_bucket
from support.tiny_runs import trainer_of

from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import open_store
from todi_offline.cache.store.staging import Staging
from todi_offline.capturing import capture
from todi_offline.teacher.in_transformers import Teacher
from todi_offline.training.stream import WindowShuffledOrder

PLACE = "s3://bucket/cache"
NODES = 2
LIMIT_SECONDS = 150.0


def node(rank: int, port: int, endpoint: str, out: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Train on one of the nodes, with one process and a staging folder of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(NODES), "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)  # no node waits for ever
    torch.set_num_threads(1)
    fsspec.config.conf["s3"] = {"endpoint_url": endpoint}
    _, prepare = WindowShuffledOrder.__init__.__defaults__ or ()
    WindowShuffledOrder.__init__.__defaults__ = (1, prepare)  # type: ignore[attr-defined]
    for name, settings in runs.items():
        cache = open_cache(open_store(PLACE, Staging(out / f"{name}-{rank}")))
        trainer = trainer_of(out / f"run-{name}-{rank}", cache, **settings)
        trainer.train()
        (out / f"{name}-{rank}.txt").write_text(str(trainer.num_tokens_trained))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def bucket(teacher: Teacher, conversations: list[Row]) -> Iterator[Proxy]:
    with s3_bucket() as proxy:
        capture(teacher, tokenised(conversations[:160]), PLACE, k=4, tail_samples=1, shard_tokens=4096, codec="fast")
        yield proxy


def copies(folder: Path) -> Counter[str]:
    return Counter(path.name.partition("-")[0] for path in folder.iterdir())


@pytest.mark.slow
def test_each_node_copies_what_it_reads_once(bucket: Proxy, tmp_path: Path) -> None:
    cache = open_cache(PLACE)
    num_shards, names = cache.manifest.num_shards, set(cache.manifest.arrays)
    assert num_shards >= 5
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bucket.mend()
    batch = {"per_device_train_batch_size": 10}
    runs = {"short": {"max_steps": 1} | batch, "whole": {"num_train_epochs": 1} | batch}
    torch.multiprocessing.spawn(node, (port, bucket.endpoint, tmp_path, runs), nprocs=NODES)
    for rank in range(NODES):
        assert copies(tmp_path / f"whole-{rank}") == dict.fromkeys(names, num_shards)
        short = copies(tmp_path / f"short-{rank}")
        assert set(short) == names
        assert max(short.values()) < num_shards  # a step reads some of the windows, each of one shard here
        assert int((tmp_path / f"whole-{rank}.txt").read_text()) == int(cache.num_tokens.sum())
    fetched = Counter(path for method, path in bucket.requests if method == "GET" and "/c/" in path)
    assert set(fetched.values()) <= {NODES, 2 * NODES}  # once a node and a run
