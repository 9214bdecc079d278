"""Pointing clients at a Hub: fresh processes by their environment, or this process by the client's settings."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Optional

import pytest


_TESTS = Path(__file__).parent.parent
_SETTINGS = ("HF_", "HUGGINGFACE", "HUGGING_FACE", "TRANSFORMERS_")


class Waits(list):
    """The seconds that a client would have waited between its tries; it does not wait."""

    def sleep(self, seconds: float) -> None:
        """Stands in for `time.sleep`, and lets other threads go on."""
        self.append(seconds)
        time.sleep(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Client:
    """How tests make a client talk to a Hub."""

    url: str
    token: str
    home: Path

    def environment(self, home: str = "hf_home", **overrides: Optional[str]) -> dict[str, str]:
        """The environment of a process whose clients know only this Hub.

        Args:
            home (`str`): The name of its `HF_HOME`; one that was not used before is an empty cache.
            overrides (`Optional[str]`): Further variables; `None` removes one.

        Returns:
            `dict[str, str]`: For `subprocess.run(env=...)`: this process's, without settings of the Hub or of proxies.
        """
        variables: dict[str, Optional[str]] = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_SETTINGS) and not name.lower().endswith("_proxy")
        }
        variables |= {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.home / home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
            # Whatever would leave the machine fails at once instead.
            "HTTP_PROXY": "http://127.0.0.1:9",
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_TESTS), os.environ.get("PYTHONPATH")])),
        }
        variables |= overrides
        return {name: value for name, value in variables.items() if value is not None}

    def run(self, code: str, *arguments: str, home: str = "hf_home", **overrides: Optional[str]) -> str:
        """What a fresh process prints that runs the code, in an empty folder.

        Raises:
            AssertionError: If it fails; with what it wrote to its error stream.
        """
        folder = self.home / "cwd"
        folder.mkdir(parents=True, exist_ok=True)
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *arguments],
            env=self.environment(home, **overrides),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    def connect(self, monkeypatch: pytest.MonkeyPatch, home: str = "hf_home", wait: bool = False) -> Waits:
        """Sets this process's `huggingface_hub`, and with it transformers and PEFT, as `environment` would.

        The client's functions stay as they are: only constants that it reads from the environment at its import are
        changed, objects made from them, and, without `wait`, its sleep between two tries. Clients with settings of
        their own (`datasets`) need a process of their own.

        Args:
            monkeypatch (`pytest.MonkeyPatch`): Undoes it after the test.
            home (`str`): The name of the cache's folder.
            wait (`bool`): Whether the client waits before it tries again.

        Returns:
            `Waits`: The seconds that it did not wait.
        """
        import huggingface_hub.file_download
        from huggingface_hub import HfFileSystem, constants, hf_api
        from huggingface_hub.utils import _detect_agent, _http

        folder, waits = self.home / home, Waits()
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_URL_HOSTS": constants.HF_URL_HOSTS | {"127.0.0.1"},
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HOME": str(folder),
            "HF_HUB_CACHE": str(folder / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(folder / "hub"),
            "HF_ASSETS_CACHE": str(folder / "assets"),
            "HF_TOKEN_PATH": str(folder / "token"),
            "HF_STORED_TOKENS_PATH": str(folder / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(folder / ".agent_harnesses.json"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {_http._url_origin(self.url)})
        monkeypatch.setattr(_detect_agent, "_registry", None)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        if "transformers.utils.hub" in sys.modules:
            monkeypatch.setattr(sys.modules["transformers.utils.hub"], "_hf_api", None)
        # Some libraries look at the environment again.
        variables = self.environment(home)
        for name in set(os.environ) - set(variables):
            monkeypatch.delenv(name)
        for name in set(variables) - {"PYTHONPATH"}:
            monkeypatch.setenv(name, variables[name])
        if not wait:
            monkeypatch.setattr(_http, "time", waits)
            monkeypatch.setattr(huggingface_hub.file_download, "time", waits)
        self._forget_clients(HfFileSystem, _http)
        return waits

    def close(self) -> None:
        """Lets go of the connections of this process's clients."""
        if "huggingface_hub.utils._http" in sys.modules:
            from huggingface_hub import HfFileSystem
            from huggingface_hub.utils import _http

            self._forget_clients(HfFileSystem, _http)

    @staticmethod
    def _forget_clients(file_system: type, http: object) -> None:
        file_system.clear_instance_cache()
        http.close_session()
