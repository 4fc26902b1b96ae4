"""Plain torch modules: the trunk, the family of MTP heads and the loss. No module here knows which rank it runs on."""
