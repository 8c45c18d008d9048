"""Other people's models with stattn's attention; nothing here is imported before it is asked for."""
