"""An LMCache server's HTTP API, of this and of earlier generations."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from lmcache_cli import api, legacy
from lmcache_cli.client.transport import Service
from lmcache_cli.errors import BadAnswer, HttpFailure, ServerError, WrongService

_UNKNOWN = (404, 405)


class CacheServer(Service):
    """An LMCache server."""

    def status(self) -> api.Status:
        """GET /status (`/api/status` of the first generation)."""
        document = self._call("GET", api.PATH_STATUS, former_paths=(legacy.PATH_STATUS,))
        if not document.keys() & {"is_healthy", "engine_type", "storage_manager"}:
            raise BadAnswer(f"what {self._url}{api.PATH_STATUS} answers is no LMCache status")
        return api.from_json(api.Status, legacy.modern_status(document))

    def clear(self, request: api.ClearRequest) -> api.Cleared:
        """POST /cache/clear (elsewhere on earlier generations, whose answer says nothing more)."""
        document = self._call("POST", api.PATH_CLEAR, api.to_json(request), former_paths=legacy.PATHS_CLEAR)
        reply = api.from_json(api.ClearReply, document)
        if reply.status not in ("ok", "success"):
            raise BadAnswer(f"{self._url}{api.PATH_CLEAR} did not confirm that the cache was cleared")
        return reply.cleared or api.Cleared()

    def quotas(self) -> api.QuotaList:
        """GET /quota: every tenant that has a limit."""
        return api.from_json(api.QuotaList, self._call("GET", api.PATH_QUOTA))

    def quota(self, salt: str) -> api.Quota:
        """GET /quota/{salt}."""
        return api.from_json(api.Quota, self._call("GET", api.quota_path(salt)))

    def set_quota(self, salt: str, limit: api.QuotaLimit) -> api.QuotaChange:
        """PUT /quota/{salt}."""
        return api.from_json(api.QuotaChange, self._call("PUT", api.quota_path(salt), api.to_json(limit)))

    def delete_quota(self, salt: str) -> api.QuotaChange:
        """DELETE /quota/{salt}."""
        return api.from_json(api.QuotaChange, self._call("DELETE", api.quota_path(salt)))

    def lookup(self, request: api.LookupRequest) -> api.LookupReply:
        """POST /cache/lookup: what it holds of a prompt; nothing is moved."""
        return api.from_json(api.LookupReply, self._call("POST", api.PATH_LOOKUP, api.to_json(request)))

    def metrics(self) -> str:
        """GET /metrics: Prometheus text."""
        return self._answer("GET", api.PATH_METRICS).decode("utf-8", "replace")

    def _call(self, method: str, path: str, body: Any = None, former_paths: tuple[str, ...] = ()) -> dict[str, Any]:
        try:
            return self._document(method, path, body)
        except HttpFailure as failure:
            if failure.status not in _UNKNOWN:
                raise
            for former_path in former_paths:
                try:
                    return self._document(method, former_path, None)
                except HttpFailure as former:
                    if former.status not in _UNKNOWN:
                        raise
            if self._is_engine():
                raise WrongService(self._engine_hint()) from failure
            raise

    def _is_engine(self) -> bool:
        """Whether a serving engine answers here: it lists models, or asks for a key to do so, or has /health."""
        try:
            self._answer("GET", api.ENGINE_PATH_MODELS)
        except HttpFailure as failure:
            if failure.status in (401, 403):
                return True
        except ServerError:
            return False
        else:
            return True
        try:
            self._answer("GET", api.ENGINE_PATH_HEALTH)
        except ServerError:
            return False
        return True

    def _engine_hint(self) -> str:
        host = urlsplit(self._url).hostname or ""
        usual = f"http://{f'[{host}]' if ':' in host else host}:{api.HTTP_PORT}"
        return (
            f"{self._url} is a serving engine (vLLM or alike), not an LMCache server, whose port is {api.HTTP_PORT} "
            f"unless set otherwise" + (f": try --url {usual}" if usual != self._url else "")
        )
