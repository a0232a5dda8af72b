"""A local web page: a picture, its answer at every size beside latency and cost, and a slider for the budget"""
import math
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .adaptive import measure_latency
from .errors import UserError, one_line
from .fields import check_argument, integer
from .predict import top
from .session import Session

__all__ = ['answer_all', 'build_app', 'choose', 'serve']

_MAX_UPLOAD = '64mb'
_KEEP_SECONDS = 600  # that a picture is kept; it is also deleted when the server ends
HEADERS = ['size', 'answer', 'probability', 'time', 'multiply-adds', 'cost']
_SYSTEM_FONTS = dict(font=['system-ui', 'sans-serif'], font_mono=['monospace'])  # nothing is fetched


def answer_all(session: Session, image: str, milliseconds: Mapping[int, float]) -> List[Dict[str, Any]]:
    """Answer an image at every size, largest first.

    Args:
        session: The session.
        image: Name of a file.
        milliseconds: Time of an image at each resolution.

    Returns:
        For each size 'resolution', 'name' and 'probability' of the best class, 'milliseconds', 'madds' and 'cost', the
        share of the largest size's multiply-adds.

    Raises:
        UserError: The image cannot be used, or the network fails.
    """
    rows = []
    image = session.read(image)
    for resolution in session.resolutions:
        threshold = None if session.threshold is None else 0.  # the best label, sure or not
        (best,) = top(session.predict(image, resolution)[0], session.class_names, 1, threshold)
        madds = session.madds.get(resolution, 0)
        rows.append(dict(
            resolution=resolution, name=best['name'], probability=best['probability'],
            milliseconds=milliseconds[resolution], madds=madds, cost=madds / max(session.madds.values(), default=1)))
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
        raise ImportError('The page needs Gradio: pip install gradio.') from e
    latency, overhead = measure_latency(session)  # medians: one run of each size would change from picture to picture
    milliseconds = {r: 1e3 * (overhead + seconds) for r, seconds in latency.items()}
    slowest_ms = max(milliseconds.values())
    step = 10. ** math.floor(math.log10(slowest_ms / 10))

    def classify(picture: Any, budget_ms: float) -> Tuple[List[Dict[str, Any]], List[List[str]], str]:
        """Answer a picture at every size."""
        if picture is None or not picture.path:
            return [], [], ''
        try:
            rows = answer_all(session, picture.path, milliseconds)
        except UserError as e:  # without the names of files on this machine
            message = one_line(e).replace(picture.path, picture.orig_name or 'The picture')
            message = message.replace(session.path, os.path.basename(session.path))
            raise gradio.Error(message, print_exception=False) from e
        cells = [[
            f"{row['resolution']} px", row['name'], f"{row['probability']:.1%}", f"{row['milliseconds']:.1f} ms",
            f"{row['madds'] / 1e6:.0f}M", f"{row['cost']:.0%}",
        ] for row in rows]
        return rows, cells, describe(rows, budget_ms)

    def describe(rows: List[Dict[str, Any]], budget_ms: float) -> str:
        """Return in words which size the budget allows."""
        if not rows:
            return ''
        row, fits = choose(rows, budget_ms)
        what = f"**{row['name']}** at {row['resolution']} px, {row['milliseconds']:.1f} ms"
        if fits:
            return f'Within {budget_ms:g} ms: {what}.'
        return f'No size keeps {budget_ms:g} ms. The smallest: {what}.'

    with gradio.Blocks(title='timm_rs', analytics_enabled=False, delete_cache=(_KEEP_SECONDS, _KEEP_SECONDS)) as app:
        gradio.Markdown(
            f"# {session.metadata.get('architecture', 'Network')} at {len(session.resolutions)} sizes\n"
            'Every size answers the picture. The largest one that keeps the budget on this machine is chosen.')
        rows = gradio.State([])
        with gradio.Row():
            image = gradio.Image(type='filepath', label='Picture', sources=['upload'])
            image.preprocess = lambda picture: picture  # Gradio's prints a traceback where it cannot open the file
            with gradio.Column():
                budget = gradio.Slider(
                    round(step, 6), round(20 * step * math.ceil(slowest_ms / step / 10), 6),
                    round(step * math.ceil(slowest_ms / step), 6), step=round(step, 6), label='Budget in milliseconds')
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
    """Open the page. Pictures of more than 64 MB are refused; others stay on disk for some minutes.

    Args:
        path: File of `timm-rs export --format onnx`, or a Session.
        host: Address to listen at, by default only that of this machine.
        port: Port to listen at, a free one from 7860 on if None.
        threads: Threads of an inference, all cores if None.
        block: Serve until it is interrupted.

    Returns:
        The application and the page's address.

    Raises:
        ImportError: Gradio is not installed.
        UserError: The file is not an export of timm_rs, or an argument is not usable.
        OSError: The port is taken.
    """
    if port is not None:
        check_argument('port', port, integer(1, 65535))
    session = Session.open(path, threads)
    app = build_app(session)
    import gradio

    _, address, _ = app.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
        max_file_size=_MAX_UPLOAD, theme=gradio.themes.Default(**_SYSTEM_FONTS), footer_links=[])
    print(f'{session.path}: {address}', flush=True)
    if block:
        app.block_thread()
    return app, address
