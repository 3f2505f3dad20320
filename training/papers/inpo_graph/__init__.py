"""Influence-aware NPO on graphs (INPO, arXiv 2510.19479), on a synthetic citation graph; weights reconstructed."""
