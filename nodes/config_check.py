"""What `serve` would refuse at its start, found without starting: `ai-cluster config check`.

Each check is the one that the start makes, in its order and with its message; nothing is made or locked, and no port of
the configuration is bound, so the node may be running meanwhile. What only running shows is not looked at: ports in use
or reserved, a graph that cannot be loaded, a disk that is full, what other nodes say.
"""

from __future__ import annotations

from nodes.certificate import configured_certificate
from nodes.config import ConfigInvalid, NodeConfig
from nodes.data_directory import DataDirectory, check_writable, folder_fix
from nodes.engine.cuda import DeviceUnavailable, cannot_run, prepare_cuda
from nodes.engine.model_kinds import read_folder
from nodes.engine.model_loader import ModelFolderInvalid
from nodes.http_server import connections_max
from nodes.keyring_file import check_keyring
from nodes.sockets import advertised_address, check_bindable
from nodes.store import check_store
from nodes.tracing_setup import check_tracing


def check_start(config: NodeConfig) -> None:
    """Raises ConfigInvalid for the first thing at which a start would end."""
    for _, path in config.models():
        try:
            read_folder(path, config.variant, config.provider)
        except ModelFolderInvalid as exc:
            raise ConfigInvalid(str(exc)) from exc
    data = DataDirectory(config.data_dir)
    data.check()
    check_bindable(config)
    _check_log_dir(config)
    check_keyring(config.data_dir, config)
    if config.admin_token is None:
        data.kept_admin_token()
    data.last_generation()
    configured_certificate(config)
    check_tracing(config)
    check_store(config.data_dir)
    advertised_address(config, config.mesh)
    connections_max(config.http_connections_max)
    _check_cuda(config)


def _check_cuda(config: NodeConfig) -> None:
    """Where models may run nowhere else. Whether they fit into the device's memory is not looked at."""
    models = config.models()
    if config.provider != "cuda" or not models:
        return
    try:
        prepare_cuda(config.device)
    except DeviceUnavailable as exc:
        raise ConfigInvalid(str(cannot_run(models[0][1], str(exc)))) from exc


def _check_log_dir(config: NodeConfig) -> None:
    if config.log_console == "json":
        return  # no files are written
    try:
        check_writable(config.log_dir)
    except OSError as exc:
        raise ConfigInvalid(f"log_dir {config.log_dir}: {exc.strerror}; {folder_fix(exc, '--log-dir')}") from exc
