"""Writes roundings as QuantizeLinear and DequantizeLinear, shapes such graphs for a runtime, and reads them back."""
