"""Recommenders: interaction data, training, ranking metrics.

::

    from keras_efficient import recsys

    train = recsys.read_lists("train.txt.gz", num_users=29_858, num_items=40_981)
    test = recsys.read_lists("test.txt.gz", num_users=29_858, num_items=40_981)
    (train, test), new_ids = recsys.by_frequency(train, test)
    ranked = recsys.top_k(scores, 20, exclude=train.histories())
    recsys.mean_and_error(recsys.ndcg(ranked, test.histories(), 20))

Importing this package imports neither Keras nor TensorFlow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keras_efficient import lazy

if TYPE_CHECKING:
    from keras_efficient.distribution import TableParallel, local_rows
    from keras_efficient.models.sampled import SampledSoftmax
    from keras_efficient.ranking import hit_rate, mean_and_error, ndcg, recall, reciprocal_rank, top_k
    from keras_efficient.recsys.batches import HistoryBatches
    from keras_efficient.recsys.evaluation import Ranking, evaluate
    from keras_efficient.recsys.files import read_lists, read_movielens, read_sequences, read_table
    from keras_efficient.recsys.interactions import Interactions, by_frequency
    from keras_efficient.recsys.losses import ranknet
    from keras_efficient.recsys.splits import at_random, by_time, leave_one_out, without
    from keras_efficient.recsys.training import train

__all__ = [
    "HistoryBatches",
    "Interactions",
    "Ranking",
    "SampledSoftmax",
    "TableParallel",
    "at_random",
    "by_frequency",
    "by_time",
    "evaluate",
    "hit_rate",
    "leave_one_out",
    "local_rows",
    "mean_and_error",
    "ndcg",
    "ranknet",
    "read_lists",
    "read_movielens",
    "read_sequences",
    "read_table",
    "recall",
    "reciprocal_rank",
    "top_k",
    "train",
    "without",
]

_HOMES = {
    "HistoryBatches": "batches",
    "Interactions": "interactions",
    "Ranking": "evaluation",
    "TableParallel": ".distribution",
    "local_rows": ".distribution",
    "SampledSoftmax": ".models.sampled",
    "at_random": "splits",
    "by_frequency": "interactions",
    "by_time": "splits",
    "evaluate": "evaluation",
    "hit_rate": ".ranking",
    "leave_one_out": "splits",
    "mean_and_error": ".ranking",
    "ndcg": ".ranking",
    "ranknet": "losses",
    "read_lists": "files",
    "read_movielens": "files",
    "read_sequences": "files",
    "read_table": "files",
    "recall": ".ranking",
    "reciprocal_rank": ".ranking",
    "tfrs": "tfrs",
    "top_k": ".ranking",
    "train": "training",
    "without": "splits",
}


__getattr__, __dir__ = lazy.names(__name__, _HOMES, __all__)
