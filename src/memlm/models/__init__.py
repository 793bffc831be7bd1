"""Models: the only code that knows Hugging Face modules."""

from ._attach import attach as attach
from ._black_box import BlackBox as BlackBox
from ._capture import forward_to_site as forward_to_site
from ._capture import forward_with_keys as forward_with_keys
from ._carried import CarriedCache as CarriedCache
from ._language_model import LanguageModel as LanguageModel
from ._language_model import ScoredBatch as ScoredBatch
from ._language_model import Scorer as Scorer
from ._layers import DecoderLayer as DecoderLayer
from ._layers import decoder_layers as decoder_layers
from ._layers import find_decoder as find_decoder
from ._layers import path_of as path_of
from ._load import load as load
from ._load import reference_lm as reference_lm
from ._output import capture_hidden as capture_hidden
from ._output import output_embedding as output_embedding
from ._sites import KeySite as KeySite
from ._sites import find_key_site as find_key_site

__all__ = [
    "BlackBox",
    "CarriedCache",
    "DecoderLayer",
    "KeySite",
    "LanguageModel",
    "ScoredBatch",
    "Scorer",
    "attach",
    "capture_hidden",
    "decoder_layers",
    "find_decoder",
    "find_key_site",
    "forward_to_site",
    "forward_with_keys",
    "load",
    "output_embedding",
    "path_of",
    "reference_lm",
]
