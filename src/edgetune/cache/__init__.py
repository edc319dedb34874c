"""The frozen part of a network computed once: its features by picture and view, kept in memory or on disk."""

from edgetune.cache.features import FILES, Features, Sight, open_features
from edgetune.cache.settings import Cache, CacheUse

__all__ = ["FILES", "Cache", "CacheUse", "Features", "Sight", "open_features"]
