"""What ``stattn.train`` and ``stattn.trainer`` consist of: the run, tasks, folders of videos, adapters."""
