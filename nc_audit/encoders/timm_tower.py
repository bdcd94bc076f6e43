"""Image encoder from timm: any of its backbones, pooled, with weights from a file, the hub cache or the hub."""

from __future__ import annotations
