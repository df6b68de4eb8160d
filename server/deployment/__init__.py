"""Deployment: keys and certificates, sites, and runs submitted to a SuperLink."""
