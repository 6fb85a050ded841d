"""The verbs of the command, one file each; a file is imported when its verb runs."""
