"""Quantised weight formats: encode, decode, describe."""
