"""Adaptive and static ranks side by side on real models: methods, tasks, runs, stored rows, report."""
