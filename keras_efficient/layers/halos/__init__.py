"""An output layer of very many classes, answered from a few candidates."""

from keras_efficient.layers.halos.index import Index
from keras_efficient.layers.halos.layer import HALOSOutput
from keras_efficient.layers.halos.plans import HashPlan, Plan, RouterPlan

__all__ = ["HALOSOutput", "HashPlan", "Index", "Plan", "RouterPlan"]
