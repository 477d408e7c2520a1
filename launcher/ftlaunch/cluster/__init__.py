"""What is known of a SLURM cluster: the vocabulary of its profile, and where profiles are found."""

NEW = "slurm/profiles/default.toml"
"""The profile to write where there is none: it is found from the working directory, and counts where none is named."""
NAME_ONE = f"add --cluster NAME; where there is no profile yet, an empty {NEW} is one: --cluster default"
"""What to do where a profile is needed and none is named: an empty one has the cluster's own defaults."""
