"""Other projects' formats for trained models. Names and settings only; nothing here imports torch or the other project."""
