"""Training: the reference language model, and models that learn to use a memory."""

from ._bm25 import bm25_chain as bm25_chain
from ._language_model import train_language_model as train_language_model
from ._memories import External as External
from ._memories import Local as Local
from ._memories import LongTerm as LongTerm
from ._memories import Places as Places
from ._memories import TrainingMemory as TrainingMemory
from ._reader import Asked as Asked
from ._reader import ReaderLoss as ReaderLoss
from ._reader import reader_loss as reader_loss
from ._reader import train_reader as train_reader
from ._recipe import ModelShape as ModelShape
from ._recipe import Recipe as Recipe
from ._recipe import load_recipe as load_recipe
from ._scratch import train_tokenizer as train_tokenizer
from ._segments import Segments as Segments
from ._segments import bm25_segments as bm25_segments
from ._segments import consecutive_segments as consecutive_segments
from ._spalm import SpalmGate as SpalmGate
from ._spalm import SpalmLoss as SpalmLoss
from ._spalm import add_spalm_gate as add_spalm_gate
from ._spalm_data import SpalmSegments as SpalmSegments
from ._spalm_data import neighbor_tokens as neighbor_tokens
from ._spalm_data import spalm_segments as spalm_segments
from ._spalm_recipe import SpalmBatches as SpalmBatches
from ._spalm_recipe import SpalmRecipe as SpalmRecipe
from ._spalm_recipe import SpalmSettings as SpalmSettings
from ._spalm_recipe import load_spalm_recipe as load_spalm_recipe
from ._streams import StreamBatch as StreamBatch
from ._streams import document_streams as document_streams
from ._train_spalm import train_spalm as train_spalm
from ._train_trime import train_trime as train_trime
from ._trainer import TrimeTrainer as TrimeTrainer
from ._trime import TrimeLoss as TrimeLoss
from ._trime_recipe import Batches as Batches
from ._trime_recipe import MemorySettings as MemorySettings
from ._trime_recipe import TrimeRecipe as TrimeRecipe
from ._trime_recipe import TrimeSchedule as TrimeSchedule
from ._trime_recipe import load_trime_recipe as load_trime_recipe

__all__ = [
    "Asked",
    "Batches",
    "External",
    "Local",
    "LongTerm",
    "MemorySettings",
    "ModelShape",
    "Places",
    "ReaderLoss",
    "Recipe",
    "Segments",
    "SpalmBatches",
    "SpalmGate",
    "SpalmLoss",
    "SpalmRecipe",
    "SpalmSegments",
    "SpalmSettings",
    "StreamBatch",
    "TrainingMemory",
    "TrimeLoss",
    "TrimeRecipe",
    "TrimeSchedule",
    "TrimeTrainer",
    "add_spalm_gate",
    "bm25_chain",
    "bm25_segments",
    "consecutive_segments",
    "document_streams",
    "load_recipe",
    "load_spalm_recipe",
    "load_trime_recipe",
    "neighbor_tokens",
    "spalm_segments",
    "train_language_model",
    "train_spalm",
    "train_tokenizer",
    "train_trime",
]
