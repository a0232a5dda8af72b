"""A local web page: a picture, its answer at every size beside latency and cost, and a slider for the budget"""
import math
import os
import signal
from contextlib import suppress
from html import escape
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from PIL import Image

from .adaptive import measure_latency
from .errors import UserError, one_line
from .fields import check_argument, integer
from .predict import top
from .session import Session

__all__ = ['answer_all', 'build_app', 'choose', 'serve']

_TOP = 5
_MAX_UPLOAD = '64mb'
_KEEP_SECONDS = 600  # that a picture is kept; it is also deleted when the server ends
EXAMPLE = os.path.join(os.path.dirname(__file__), 'example.jpg')
_STYLE = """<style>
.sizes { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .75rem }
.sizes section, .sizes figure { border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .6rem;
  margin: 0 }
.sizes .chosen { outline: 3px solid var(--color-accent) }
.sizes h3 { margin: 0 !important } .sizes small { font-weight: normal; white-space: nowrap }
.sizes table { width: 100%; table-layout: fixed; margin: 0 !important; font-size: .85rem !important }
.sizes table { border: 0 !important }
.sizes tr, .sizes td { border: 0 !important; padding: 0 .3rem 0 0 !important; overflow-wrap: anywhere }
.sizes td + td { width: 30% } .sizes td + td + td { width: 3.6rem; text-align: right; white-space: nowrap }
.sizes meter { width: 100% } .sizes svg { width: 100%; font-size: 9px; fill: currentColor }
</style>"""
_SYSTEM_FONTS = dict(font=['system-ui', 'sans-serif'], font_mono=['monospace'])  # nothing is fetched


def answer_all(session: Session, image: str, milliseconds: Mapping[int, float]) -> List[Dict[str, Any]]:
    """Answer an image at every size, largest first.

    Args:
        session: The session.
        image: Name of a file.
        milliseconds: Time of an image at each resolution.

    Returns:
        For each size 'resolution', 'top', the most probable classes with 'name' and 'probability', 'milliseconds',
        'madds' and 'cost', the share of the largest size's multiply-adds.

    Raises:
        UserError: The image cannot be used, or the network fails.
    """
    rows = []
    image = session.read(image)
    for resolution in session.resolutions:
        threshold = None if session.threshold is None else 0.  # the best labels, sure or not
        best = top(session.predict(image, resolution)[0], session.class_names, _TOP, threshold)
        madds = session.madds.get(resolution, 0)
        rows.append(dict(
            resolution=resolution, top=best, milliseconds=milliseconds[resolution], madds=madds,
            cost=madds / max(session.madds.values(), default=1)))
    return rows


def choose(rows: Sequence[Dict[str, Any]], budget_ms: float) -> Tuple[Dict[str, Any], bool]:
    """Return the row of the largest size within a budget and True, else that of the smallest size and False."""
    fitting = [row for row in rows if row['milliseconds'] <= budget_ms]
    return (fitting[0], True) if fitting else (rows[-1], False)


def render(rows: Sequence[Dict[str, Any]], chosen: Optional[Dict[str, Any]]) -> str:
    """Return the answers at all sizes as HTML: a card for each, and a plot of probability over time."""
    cards = []
    for row in rows:
        bars = ''.join(
            f"<tr><td>{escape(best['name'])}</td><td><meter value=\"{best['probability']}\"></meter></td>"
            f"<td>{best['probability']:.1%}</td></tr>" for best in row['top'])
        cards.append(
            f"<section{' class=chosen' if row is chosen else ''}><h3>{row['resolution']} px <small>"
            f"{row['milliseconds']:.1f} ms, {row['madds'] / 1e6:.0f}M multiply-adds, {row['cost']:.0%}</small></h3>"
            f'<table>{bars}</table></section>')
    return f"{_STYLE}<div class=sizes>{''.join(cards)}{_plot(rows, chosen)}</div>"


def _plot(rows: Sequence[Dict[str, Any]], chosen: Optional[Dict[str, Any]]) -> str:
    """Return a figure of the best answer's probability over the time of each size."""
    slowest = max(row['milliseconds'] for row in rows)
    points = [(25 + 190 * row['milliseconds'] / slowest, 95 - 80 * row['top'][0]['probability']) for row in rows]
    axes = '<path d="M25 10V95H235" fill=none stroke=currentColor stroke-width=.5 />'
    line = f"<polyline points=\"{' '.join(f'{x:.1f},{y:.1f}' for x, y in points)}\" fill=none stroke=currentColor />"
    marks = ''.join(
        f'<circle cx={x:.1f} cy={y:.1f} r={5 if row is chosen else 3} /><text x={x - 8:.1f} y={y + 14:.1f}>'
        f"{row['resolution']}</text>" for row, (x, y) in zip(rows, points))
    labels = (
        '<text x=0 y=18>100%</text><text x=8 y=95>0%</text><text x=25 y=108>0</text>'
        f'<text x=195 y=108>{slowest:.1f} ms</text>')
    return ('<figure><figcaption>Probability of the best answer over time</figcaption>'
            f'<svg viewBox="0 0 240 112" role=img>{axes}{line}{marks}{labels}</svg></figure>')


def build_app(session: Session) -> Any:
    """Return the page as gradio.Blocks.

    Raises:
        ImportError: Gradio is not installed.
    """
    try:
        import gradio
    except ImportError as e:
        raise ImportError('The page needs Gradio: pip install gradio.') from e
    session.check_classifies()
    latency, overhead = measure_latency(session)  # medians: one run of each size would change from picture to picture
    milliseconds = {r: 1e3 * (overhead + seconds) for r, seconds in latency.items()}
    slowest_ms = max(milliseconds.values())
    step = 10. ** math.floor(math.log10(slowest_ms / 10))

    def classify(picture: Any, budget_ms: float) -> Tuple[List[Dict[str, Any]], str, str]:
        """Answer a picture at every size."""
        if picture is None or not picture.path:
            return [], '', ''
        try:
            rows = answer_all(session, picture.path, milliseconds)
        except UserError as e:  # without the names of files on this machine
            message = one_line(e).replace(picture.path, picture.orig_name or 'The picture')
            message = message.replace(session.path, os.path.basename(session.path))
            raise gradio.Error(message, print_exception=False) from e
        return rows, *describe(rows, budget_ms)

    def describe(rows: List[Dict[str, Any]], budget_ms: float) -> Tuple[str, str]:
        """Return the answers with the size that the budget allows marked, and that size in words."""
        if not rows:
            return '', ''
        row, fits = choose(rows, budget_ms)
        what = f"**{row['top'][0]['name']}** at {row['resolution']} px, {row['milliseconds']:.1f} ms"
        text = f'Within {budget_ms:g} ms: {what}.' if fits else f'No size keeps {budget_ms:g} ms. The smallest: {what}.'
        return render(rows, row), text

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
                # gradio.Examples would lose the image's preprocess.
                gradio.Button('Take an example picture').click(
                    lambda: Image.open(EXAMPLE), None, image, api_name='example', show_progress='hidden')
        sizes = gradio.HTML(elem_id='sizes')
        image.change(classify, [image, budget], [rows, sizes, chosen], api_name='classify')
        budget.change(describe, [rows, budget], [sizes, chosen], api_name='describe', show_progress='hidden')
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
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # after which the pictures are deleted
        app.block_thread()
    return app, address
