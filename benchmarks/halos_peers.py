"""Searches for the largest inner product, each by the settings that its users tune, on the planted set.

Run in an environment of its own, which needs neither Keras nor TensorFlow (`pip install faiss-cpu hnswlib scann`):

    OMP_NUM_THREADS=1 python -m benchmarks.halos_peers FOLDER [NAME …]      prints a line of JSON for every setting

`FOLDER` holds `rows.npy` (units, d + 1), weights and biases, `queries.npy` (n, d) and `labels.npy` (n,). A bias is one
more dimension of rows and of queries. Time is that of one call for one query on one thread; building takes all cores.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TIMED = 300  # queries
LISTS = 4096
PROBES = (1, 2, 4, 8, 16, 32, 64, 128)

Search = Callable[[np.ndarray], Any]
Settings = Iterator[tuple[str, Search]]


def _faiss_lists(rows: np.ndarray, description: str, refined: bool = False) -> Settings:
    import faiss

    index = faiss.index_factory(rows.shape[1], description, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    faiss.omp_set_num_threads(1)
    lists = faiss.extract_index_ivf(index)
    for factor in (4, 16) if refined else (1,):
        for probes in PROBES:
            lists.nprobe = probes
            if refined:
                index.k_factor = factor
            yield f"nprobe {probes}" + (f", k_factor {factor}" if refined else ""), lambda q: index.search(q, 5)[1]


def faiss_ivf_flat(rows: np.ndarray) -> Settings:
    return _faiss_lists(rows, f"IVF{LISTS},Flat")


def faiss_ivf_pq(rows: np.ndarray) -> Settings:
    width = rows.shape[1] + -rows.shape[1] % 4
    padded = np.pad(rows, ((0, 0), (0, width - rows.shape[1])))
    for name, search in _faiss_lists(padded, f"IVF{LISTS},PQ{width // 2}x4fs,RFlat", refined=True):
        yield name, lambda q, search=search: search(np.pad(q, ((0, 0), (0, width - q.shape[1]))))


def faiss_hnsw(rows: np.ndarray) -> Settings:
    import faiss

    index = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 100
    index.add(rows)
    faiss.omp_set_num_threads(1)
    for ef in (16, 32, 64, 128, 256, 512, 1024):
        index.hnsw.efSearch = ef
        yield f"M 32, efSearch {ef}", lambda q: index.search(q, 5)[1]


def hnswlib(rows: np.ndarray) -> Settings:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=rows.shape[1])
    index.init_index(len(rows), M=24, ef_construction=100)
    index.add_items(rows)
    index.set_num_threads(1)
    for ef in (16, 32, 64, 128, 256, 512, 1024):
        index.set_ef(ef)
        yield f"M 24, ef {ef}", lambda q: index.knn_query(q, 5)[0]


def scann(rows: np.ndarray) -> Settings:
    import scann

    builder = scann.scann_ops_pybind.builder(rows, 5, "dot_product")
    tree = builder.tree(num_leaves=1600, num_leaves_to_search=64, training_sample_size=200_000)
    index = tree.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build()
    for leaves in PROBES:
        for reorder in (20, 100, 300):

            def search(q: np.ndarray, leaves: int = leaves, reorder: int = reorder) -> np.ndarray:
                options = {"leaves_to_search": leaves, "pre_reorder_num_neighbors": reorder}
                return np.stack([index.search(row, final_num_neighbors=5, **options)[0] for row in q])

            yield f"leaves {leaves}, reorder {reorder}", search


PEERS = {f.__name__: f for f in (faiss_ivf_flat, faiss_ivf_pq, faiss_hnsw, hnswlib, scann)}


def _of_one_length(rows: np.ndarray) -> np.ndarray:
    """A further column makes all rows as long as the longest, so that graphs and lists by distance find products."""
    lengths = (rows**2).sum(axis=1)
    return np.concatenate([rows, np.sqrt(lengths.max() - lengths)[:, None]], axis=1).astype(np.float32)


FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda rows: rows,
    "of one length": _of_one_length,
}


def main() -> None:
    folder = Path(sys.argv[1])
    rows, queries, labels = (np.load(folder / f"{name}.npy") for name in ("rows", "queries", "labels"))
    queries = np.concatenate([queries, np.ones((len(queries), 1), np.float32)], axis=1)
    for name in sys.argv[2:] or PEERS:
        for form, change in FORMS.items():
            changed = np.ascontiguousarray(change(rows), dtype=np.float32)
            asked = np.pad(queries, ((0, 0), (0, changed.shape[1] - queries.shape[1])))
            started, before = time.time(), _resident()
            built: dict[str, float] = {}
            for setting, search in PEERS[name](changed):
                if not built:
                    built["build_seconds"] = round(time.time() - started, 1)
                    built["gigabytes"] = round((_resident() - before) / 1e9, 2)
                found = np.concatenate([np.asarray(search(q[None])) for q in asked[:2000]])
                times = []
                for q in asked[:TIMED]:
                    begun = time.perf_counter()
                    search(q[None])
                    times.append(time.perf_counter() - begun)
                line = {"peer": name, "rows": form, "setting": setting}
                line["precision"] = round(float((found[:, 0] == labels[: len(found)]).mean()), 4)
                line["microseconds"] = round(1e6 * statistics.median(times), 1)
                print(json.dumps({**line, **built}), flush=True)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
