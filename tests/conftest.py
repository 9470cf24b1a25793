"""Shared fixtures: the real Fashion-MNIST, kept in data/raw of the checkout, and an empty MLflow store."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from toy_pipeline import make_repository

from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError
from rediffuse.sources.fashion_mnist import load_fashion_mnist
from rediffuse.tracking.store import connect

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that no process waits for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


@pytest.fixture(scope="session")
def fashion_mnist() -> dict[str, ImageSet]:
    """`train` and `test` as published.  Tests that need it are skipped on a machine that cannot get it."""
    try:
        with contextlib.chdir(ROOT):
            return load_fashion_mnist()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy repository whose pipeline has run, and was committed, without tracking.  To be copied."""
    root = tmp_path_factory.mktemp("origin") / "repository"
    make_repository(root)
    return root


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and nothing in them: making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path
