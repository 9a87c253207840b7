"""The deep part, only ever run in a fresh process: load the folder and compare what it computes."""

from __future__ import annotations
