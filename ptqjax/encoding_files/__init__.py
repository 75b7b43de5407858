"""Encodings and the state of calibration as files, and back."""

from ptqjax.encoding_files.aimet_json import encodings_json
from ptqjax.encoding_files.aimet_reading import Mismatch
from ptqjax.encoding_files.files import read_encodings, write_encodings
from ptqjax.encoding_files.quantized_models import read_quantized
from ptqjax.encoding_files.tensors import read_state, write_state
from ptqjax.encoding_files.whole_files import write_whole

__all__ = [
    "Mismatch",
    "encodings_json",
    "read_encodings",
    "read_quantized",
    "read_state",
    "write_encodings",
    "write_state",
    "write_whole",
]
