"""Bundles and bases on disk: reading, writing and verifying them."""

from translora.bundle.base import BaseInfo, inspect_base
from translora.bundle.bundle import Bundle, common_template, read_bundle, verify_bundle, write_bundle
from translora.bundle.manifest import BundleError, Manifest

__all__ = [
    "BaseInfo",
    "Bundle",
    "BundleError",
    "Manifest",
    "common_template",
    "inspect_base",
    "read_bundle",
    "verify_bundle",
    "write_bundle",
]
