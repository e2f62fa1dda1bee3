"""Runs on disk: directories, status and identity, multiruns and their jobs, and where numbers come from."""
