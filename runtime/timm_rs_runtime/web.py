"""A local web page: a picture, its answer at every size beside latency and cost, and a slider for the budget"""
import threading
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .adaptive import measure_latency
from .predict import top
from .session import Session

__all__ = ['answer_all', 'build_app', 'choose', 'serve']

_MAX_UPLOAD = '64mb'
_KEEP_SECONDS = 600  # of a picture, which is deleted when the server ends in any case
HEADERS = ['size', 'answer', 'probability', 'time', 'multiply-adds', 'cost']
_SYSTEM_FONTS = dict(font=['system-ui', 'sans-serif'], font_mono=['monospace'])  # nothing is fetched


def answer_all(session: Session, image: str) -> List[Dict[str, Any]]:
    """Answer an image at every size, largest first.

    Returns:
        For each size 'resolution', 'name' and 'probability' of the best class, 'milliseconds' (the reading of the image
        included), 'madds' and 'cost', the share of the largest size's multiply-adds.

    Raises:
        ImageError: The image cannot be used.
    """
    rows = []
    for resolution in session.resolutions:
        start = time.perf_counter()
        logits = session.predict(image, resolution)[0]
        milliseconds = 1e3 * (time.perf_counter() - start)
        (best,) = top(logits, session.class_names, 1)
        madds = session.madds.get(resolution, 0)
        rows.append(dict(
            resolution=resolution, name=best['name'], probability=best['probability'], milliseconds=milliseconds,
            madds=madds, cost=madds / max(session.madds.values(), default=1)))
    return rows


def choose(rows: Sequence[Dict[str, Any]], budget_ms: float) -> Tuple[Dict[str, Any], bool]:
    """Return the row of the largest size within a budget and True, else that of the smallest size and False."""
    fitting = [row for row in rows if row['milliseconds'] <= budget_ms]
    return (fitting[0], True) if fitting else (rows[-1], False)


def build_app(session: Session) -> Any:
    """Return the page as gradio.Blocks.

    Raises:
        ImportError: Gradio is not installed.
    """
    try:
        import gradio
    except ImportError as e:
        raise ImportError("The page needs Gradio: pip install 'timm_rs[web]'.") from e
    lock = threading.Lock()  # what runs at the same time would be measured too
    latency, overhead = measure_latency(session)
    slowest_ms = 1e3 * (overhead + latency[session.resolutions[0]])

    def classify(image: Optional[str], budget_ms: float) -> Tuple[List[Dict[str, Any]], List[List[str]], str]:
        """Answer a picture at every size."""
        if image is None:
            return [], [], ''
        try:
            with lock:
                rows = answer_all(session, image)
        except (ValueError, RuntimeError) as e:
            raise gradio.Error(str(e), print_exception=False) from e
        return rows, [_cells(row) for row in rows], describe(rows, budget_ms)

    def describe(rows: List[Dict[str, Any]], budget_ms: float) -> str:
        """Say which size the budget buys."""
        if not rows:
            return ''
        row, fits = choose(rows, budget_ms)
        what = f"**{row['name']}** at {row['resolution']} px, {row['milliseconds']:.1f} ms"
        if fits:
            return f'Within {budget_ms:g} ms: {what}.'
        return f'No size keeps {budget_ms:g} ms. The smallest: {what}.'

    with gradio.Blocks(title='timm_rs', analytics_enabled=False, delete_cache=(_KEEP_SECONDS, _KEEP_SECONDS)) as app:
        gradio.Markdown(f"# {session.metadata.get('architecture', 'Network')} at {len(session.resolutions)} sizes")
        rows = gradio.State([])
        with gradio.Row():
            image = gradio.Image(type='filepath', image_mode=None, format='png', label='Picture', sources=['upload'])
            with gradio.Column():
                budget = gradio.Slider(
                    1, max(100, round(2 * slowest_ms)), max(1, round(slowest_ms)), step=1,
                    label='Budget in milliseconds')
                chosen = gradio.Markdown(elem_id='chosen')
        table = gradio.Dataframe(headers=HEADERS, interactive=False, elem_id='sizes')
        image.change(classify, [image, budget], [rows, table, chosen], api_name='classify')
        budget.change(describe, [rows, budget], chosen, api_name='describe', show_progress='hidden')
    return app


def serve(
        path: Any,
        host: str = '127.0.0.1',
        port: Optional[int] = None,
        threads: Optional[int] = None,
        block: bool = True,
) -> Tuple[Any, str]:
    """Open the page. Pictures of more than 64 MB are refused; they are on disk for some minutes.

    Args:
        path: File of `timm-rs export --format onnx`, or a Session.
        host: Address to listen at, this machine's alone by default.
        port: Port to listen at, a free one from 7860 on if None.
        threads: Threads of an inference, all cores if None.
        block: Serve until it is interrupted.

    Returns:
        The application and the page's address.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: The file is no export of timm_rs.
        OSError: The port is taken.
    """
    session = path if hasattr(path, 'predict') else Session(path, threads)
    app = build_app(session)
    import gradio

    _, address, _ = app.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
        max_file_size=_MAX_UPLOAD, theme=gradio.themes.Default(**_SYSTEM_FONTS), footer_links=[])
    print(f'{session.path}: {address}', flush=True)
    if block:
        app.block_thread()
    return app, address


def _cells(row: Dict[str, Any]) -> List[str]:
    return [
        f"{row['resolution']} px", row['name'], f"{row['probability']:.1%}", f"{row['milliseconds']:.1f} ms",
        f"{row['madds'] / 1e6:.0f}M", f"{row['cost']:.0%}",
    ]
