"""What a run shows when it is over: its gain and its forgetting in numbers, its mistakes in pictures."""
