"""GET /v1/models and /v1/models/{id}."""

from litestar import Request, get
from litestar.params import FromPath
from litestar.response.base import ASGIResponse

from server.errors import UnknownModel
from server.routes.completing import json_response
from server.schema.model import ModelList
from server.service import Service


@get("/v1/models", tags=["models"])
async def list_models(request: Request) -> ASGIResponse:
    """Every name that can be asked for: models, assistants, the embedder."""
    service: Service = request.app.state.service
    return json_response(ModelList(data=service.roster.models()))


@get("/v1/models/{model:str}", tags=["models"])
async def show_model(request: Request, model: FromPath[str]) -> ASGIResponse:
    """One of them."""
    service: Service = request.app.state.service
    known = service.roster.models()
    for each in known:
        if each.id == model:
            return json_response(each)
    raise UnknownModel(model, f"there are: {', '.join(each.id for each in known)}")
