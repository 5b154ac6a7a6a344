"""Manifests, fingerprints, work folders and their locks."""
