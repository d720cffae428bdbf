"""Fine-tune a diffusers model with FeRA on a folder of images: what ``fera-ext train`` runs.

:class:`fera_ext.training.settings.Settings` says what to do and :func:`fera_ext.training.loop.run` does it;
:mod:`fera_ext.training.families` knows each kind of model. Nothing here is imported until it is used.
"""
