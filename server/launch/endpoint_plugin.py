"""Entry point `vllm.endpoint_plugins`: our app inside vLLM's own server, in place of vLLM's.

Use it for what only vLLM's launcher does, such as several API server processes. `memdec serve … --print-vllm` prints the command; vLLM loads the plugin only
where VLLM_PLUGINS names it. Each API server process has its own engine client, which becomes a MemoryEngine here.
"""

from argparse import Namespace

import uvicorn.protocols.http.auto
from fastapi import FastAPI
from starlette.datastructures import State
from vllm.v1.engine.async_llm import AsyncLLM

from memdec.server import logs
from memdec.server.api.app import inform
from memdec.server.api.protocol import BoundedHttp
from memdec.server.api.settings import Settings
from memdec.server.engine.client import MemoryEngine
from memdec.server.in_place import become, overwrite
from memdec.server.launch.assembly import app_of, equip
from memdec.server.launch.vllm_command import require_one_process, settings_of


class MemoryRoutes:
    """memdec as an endpoint plugin of vLLM's, which makes one for each app."""

    name = "memdec_routes"
    required_tasks = ("generate",)
    vllms: FastAPI
    settings: Settings

    def attach_router(self, app: FastAPI) -> None:
        """Read our options, or end here: none of vLLM's routes is to be served without them."""
        self.vllms, self.settings = app, settings_of(app.state.args)
        require_one_process(self.settings, app.state.args.api_server_count or 1)
        if self.settings.limits.log_json:
            logs.write_json()

    async def init_state(self, engine_client: AsyncLLM, state: State, args: Namespace) -> None:
        """Turn the engine's client into ours, and let all requests go to the app that `memdec serve` would serve.

        vLLM's launcher serves the app that it has built. A hook that returns another would spare us taking its stack's place, and one for
        uvicorn's options the last line.
        """
        become(engine_client, MemoryEngine)
        engine_client.equip()
        updates = equip(engine_client, self.settings)
        inform(state, self.settings, engine_client.loaded, updates)
        ours = app_of(args, self.settings, say_ready=lambda: None)
        ours.state = self.vllms.state
        overwrite(self.vllms, "middleware_stack", ours)
        overwrite(uvicorn.protocols.http.auto, "AutoHTTPProtocol", BoundedHttp)
