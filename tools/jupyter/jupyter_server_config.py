"""Settings of `make lab`: a saved notebook has no execution counts and no stray metadata, as after `nbdev_clean`."""

from nbdev.clean import clean_nb


def clean_before_saving(model, **_):
    """JupyterLab calls this with every file that it is about to save."""
    if model["type"] == "notebook":
        clean_nb(model["content"])


c.ContentsManager.pre_save_hook = clean_before_saving  # noqa: F821 (Jupyter defines c)
