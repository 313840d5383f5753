"""Upload an exported folder to the Hugging Face hub."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from scaleup.errors import ConfigError, RunError, one_line

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def _explained(repo: str, key: str) -> Iterator[None]:
    """Turn errors of the hub into one line that says what to change."""
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{key}: {repo} is not a repository name ({one_line(error)})") from None
    except LocalTokenNotFoundError:
        raise ConfigError(f"{key}: no access to {constants.ENDPOINT}; {LOG_IN}") from None
    except OfflineModeIsEnabled:
        raise ConfigError(f"{key}: HF_HUB_OFFLINE is set; unset it to upload") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            problem = f"{constants.ENDPOINT} does not accept the token; {LOG_IN}"
            raise ConfigError(f"{key}: {problem}") from None
        if status in (403, 404):
            problem = f"this token may not write to {repo}; use one with write access"
            raise ConfigError(f"{key}: {problem}") from None
        raise RunError(f"{key}: {constants.ENDPOINT} failed ({one_line(error, 200)})") from error
    except OSError as error:
        problem = f"{constants.ENDPOINT} could not be reached ({one_line(error, 200)})"
        raise RunError(f"{key}: {problem}") from error


def check_access(repo: str, key: str) -> None:
    """Ask the hub whether the user is logged in.

    Args:
        key: flag or setting to name in messages.

    Raises:
        ConfigError: not logged in.
        RunError: the hub cannot be reached.
    """
    with _explained(repo, key):
        HfApi().whoami()


def push(
    folder: pathlib.Path,
    repo: str,
    *,
    private: bool,
    message: str,
    key: str,
    revision: str | None = None,
) -> str:
    """Upload the files of a folder, and return the address of the commit.

    The repository is created if it does not exist. Files in it that the folder does not have stay.

    Args:
        repo: id of the repository, such as me/film-reviews.
        private: whether a new repository can only be seen by its owner.
        revision: branch, which is created if necessary. Default: main.
        key: flag or setting to name in messages.
    """
    api = HfApi()
    with _explained(repo, key):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message
        )
    return commit.commit_url
