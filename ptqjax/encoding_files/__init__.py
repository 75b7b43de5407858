"""Encodings as files, and back."""

from ptqjax.encoding_files.aimet_json import encodings_json
from ptqjax.encoding_files.whole_files import write_whole

__all__ = ["encodings_json", "write_whole"]
