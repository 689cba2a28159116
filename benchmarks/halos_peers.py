"""Searches for the largest inner product, each by the settings that its users tune, on the planted set.

Run in an environment of its own, which needs neither Keras nor TensorFlow (`pip install faiss-cpu hnswlib scann`):

    python -m benchmarks.halos_peers build FOLDER [NAME …]                      builds and keeps what is not there yet
    OMP_NUM_THREADS=1 python -m benchmarks.halos_peers search FOLDER [NAME …]   prints a line of JSON for every setting

`FOLDER` holds `rows.npy` (units, d + 1), weights and biases, `queries.npy` (n, d) and `labels.npy` (n,). A bias is one
more dimension of rows and of queries. Rows are indexed as they are, and with a further column that makes them as long
as the longest, so that distance finds products; graphs only so, since as they are most rows cannot be come to. Time is
that of one call for one query on one thread, from NumPy to NumPy.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

QUALITY, TIMED = 4000, 300  # queries
LISTS = 4096
PROBES = (1, 2, 4, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181)
BEAMS = (16, 32, 64, 91, 128, 181, 256, 362, 512, 724, 1024)

Search = Callable[[np.ndarray], Any]
Settings = Iterator[tuple[str, Search]]


@dataclass(frozen=True)
class Peer:
    """A library's index: it is built into a file, and opened with all its settings, one after the other."""

    build: Callable[[np.ndarray, str], None]
    open: Callable[[str, int], Settings]
    forms: tuple[str, ...] = ("as they are", "of one length")
    multiple: int = 1  # of which the width of rows must be


def _build_faiss(rows: np.ndarray, path: str, description: str) -> None:
    import faiss

    index = faiss.index_factory(rows.shape[1], description, faiss.METRIC_INNER_PRODUCT)
    if description.startswith("HNSW"):
        index.hnsw.efConstruction = 100
    index.train(rows)
    index.add(rows)
    faiss.write_index(index, path)


def _open_lists(path: str, dim: int) -> Settings:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.read_index(path)
    refined = isinstance(index, faiss.IndexRefine)
    lists = faiss.extract_index_ivf(index)
    for factor in (4, 16) if refined else (1,):
        for probes in PROBES:
            lists.nprobe = probes
            if refined:
                index.k_factor = factor
            name = f"nprobe {probes}" + (f", k_factor {factor}" if refined else "")
            yield name, lambda q: index.search(q, 5)[1]


def _padded(rows: np.ndarray, multiple: int) -> np.ndarray:
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, -rows.shape[1] % multiple))), dtype=np.float32)


def _build_product_quantizer(rows: np.ndarray, path: str) -> None:
    _build_faiss(rows, path, f"IVF{LISTS},PQ{rows.shape[1] // 2}x4fs,RFlat")


def _open_faiss_graph(path: str, dim: int) -> Settings:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.read_index(path)
    for beam in BEAMS:
        index.hnsw.efSearch = beam
        yield f"M 32, efSearch {beam}", lambda q: index.search(q, 5)[1]


def _build_hnswlib(rows: np.ndarray, path: str) -> None:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=rows.shape[1])
    index.init_index(len(rows), M=24, ef_construction=100)
    index.add_items(rows)
    index.save_index(path)


def _open_hnswlib(path: str, dim: int) -> Settings:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=dim)
    index.load_index(path)
    index.set_num_threads(1)
    for beam in BEAMS:
        index.set_ef(beam)
        yield f"M 24, ef {beam}", lambda q: index.knn_query(q, 5)[0]


def _build_scann(rows: np.ndarray, path: str) -> None:
    import scann

    builder = scann.scann_ops_pybind.builder(rows, 5, "dot_product")
    tree = builder.tree(num_leaves=1600, num_leaves_to_search=64, training_sample_size=200_000)
    index = tree.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build()
    Path(path).mkdir()
    index.serialize(path)


def _open_scann(path: str, dim: int) -> Settings:
    import scann

    index = scann.scann_ops_pybind.load_searcher(path)
    for leaves in PROBES:
        for reorder in (20, 100, 300):
            options = {"leaves_to_search": leaves, "pre_reorder_num_neighbors": reorder}
            yield (
                f"leaves {leaves}, reorder {reorder}",
                lambda q, options=options: index.search(q[0], final_num_neighbors=5, **options)[0][None],
            )


def _build_lists(rows: np.ndarray, path: str) -> None:
    _build_faiss(rows, path, f"IVF{LISTS},Flat")


def _build_faiss_graph(rows: np.ndarray, path: str) -> None:
    _build_faiss(rows, path, "HNSW32,Flat")


PEERS = {
    "faiss_ivf_flat": Peer(_build_lists, _open_lists),
    "faiss_ivf_pq": Peer(_build_product_quantizer, _open_lists, multiple=4),
    "faiss_hnsw": Peer(_build_faiss_graph, _open_faiss_graph, ("of one length",)),
    "hnswlib": Peer(_build_hnswlib, _open_hnswlib, ("of one length",)),
    "scann": Peer(_build_scann, _open_scann),
}


def _of_one_length(rows: np.ndarray) -> np.ndarray:
    lengths = (rows**2).sum(axis=1)
    return np.concatenate([rows, np.sqrt(lengths.max() - lengths)[:, None]], axis=1).astype(np.float32)


FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda rows: rows,
    "of one length": _of_one_length,
}


def build(folder: Path, names: list[str]) -> None:
    """Builds indexes with all cores that the process may use, and notes how long that took."""
    rows = np.load(folder / "rows.npy")
    for name in names:
        for form in PEERS[name].forms:
            path = folder / f"{name}, {form}"
            if path.with_suffix(".json").exists():
                continue
            changed = _padded(FORMS[form](rows), PEERS[name].multiple)
            started = time.time()
            PEERS[name].build(changed, str(path))
            told = {"build_seconds": round(time.time() - started, 1), "build_cores": len(os.sched_getaffinity(0))}
            path.with_suffix(".json").write_text(json.dumps(told))
            print(json.dumps({"peer": name, "rows": form, **told}), flush=True)


def search(folder: Path, names: list[str]) -> None:
    """Prints precision and time of every setting."""
    queries, labels = (np.load(folder / f"{name}.npy") for name in ("queries", "labels"))
    queries = np.concatenate([queries, np.ones((len(queries), 1), np.float32)], axis=1)
    for name in names:
        for form in PEERS[name].forms:
            asked = queries if form == "as they are" else np.pad(queries, ((0, 0), (0, 1)))
            asked = _padded(asked, PEERS[name].multiple)
            path, before = folder / f"{name}, {form}", _resident()
            told = json.loads(path.with_suffix(".json").read_text())
            for setting, find in PEERS[name].open(str(path), asked.shape[1]):
                told.setdefault("gigabytes", round((_resident() - before) / 1e9, 2))
                answers = [np.asarray(find(q[None])).ravel() for q in asked[:QUALITY]]
                found = np.array([answer[0] if len(answer) else -1 for answer in answers])
                times = []
                for q in asked[:TIMED]:
                    begun = time.perf_counter()
                    find(q[None])
                    times.append(time.perf_counter() - begun)
                line = {"peer": name, "rows": form, "setting": setting}
                line["precision"] = round(float((found == labels[: len(found)]).mean()), 5)
                line["microseconds"] = round(1e6 * statistics.median(times), 1)
                print(json.dumps({**line, **told}), flush=True)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    # ScaNN writes into its files where they are.
    {"build": build, "search": search}[sys.argv[1]](Path(sys.argv[2]).resolve(), sys.argv[3:] or list(PEERS))
