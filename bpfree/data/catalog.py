"""The named data sets: what each one is, which files hold it, and in which layouts it may lie on a disk.

To add one: a `DatasetInfo` at the end of this file, and a reader in `readers.py` if its format is new; for a graph a
`GraphInfo`, and a reader in `graph_readers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from bpfree.data import graph_readers, readers
from bpfree.data.graph_readers import RawGraph
from bpfree.data.readers import Sets

Content = TypeVar("Content")
"""What a reader returns: `Sets` of a data set, the `RawGraph` of a graph."""

PACKAGED = Path(__file__).parent / "packaged"
"""The folder of the sets that are shipped with bpfree; LICENSES.md in it says where they come from."""


@dataclass(frozen=True)
class File:
    """One file of a data set, and how to know that it is whole.

    Attributes:
        name: as the official host calls it.
        checksum: "md5:..." or "sha256:..." of its bytes. "" for an .npz of which no published sum is known: what
            counts then are the CRC-32 sums that it holds of its own arrays.
        content: the same after gunzip, for files that are gzipped by themselves. It is what counts if given:
            distributions wrap the same content anew, or store it without the wrapper.
        size: bytes; None where nobody has published it.
        urls: where to download it, best first; empty if it is not hosted by itself.
    """

    name: str
    checksum: str
    content: str = ""
    size: int | None = None
    urls: tuple[str, ...] = ()

    def find(self, folder: Path) -> Path:
        """Where it lies in `folder`: a gzipped file may also be there without its wrapper."""
        path = folder / self.name
        plain = folder / self.name.removesuffix(".gz")
        return plain if self.content and not path.exists() and plain.exists() else path


@dataclass(frozen=True)
class Layout(Generic[Content]):
    """One way in which a data set may lie under the data root.

    Attributes:
        folder: relative to the data root; "" for a single file directly in it.
        files: all that must be there.
        read: takes `location(root)` and returns what the files hold.
    """

    folder: str
    files: tuple[File, ...]
    read: Callable[[Path], Content]

    def location(self, root: Path) -> Path:
        """The folder, or the single file, that holds the data set."""
        return root / (self.folder or self.files[0].name)

    def paths(self, root: Path) -> list[Path]:
        """Where its files are, or should be."""
        return [file.find(root / self.folder) for file in self.files]

    def is_complete(self, root: Path) -> bool:
        """Whether every file is there, whatever it holds."""
        return all(path.is_file() for path in self.paths(root))


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[Content]):
    """What is known of anything that has a name, whether data set or graph.

    Attributes:
        name: the name to load it by; `-`, `_` and capitals do not matter.
        title: as it is printed in a table.
        description: one sentence.
        licence: licence or terms, as stated by the authors.
        citation: the publication to cite.
        homepage: the authors' page.
        layouts: in the order in which they are looked for.
        aliases: other names.
        packaged: shipped with bpfree, never downloaded.
    """

    name: str
    title: str
    description: str
    licence: str
    citation: str
    homepage: str
    layouts: tuple[Layout[Content], ...]
    aliases: tuple[str, ...] = ()
    packaged: bool = False

    @property
    def source(self) -> Layout[Content]:
        """The layout that a download fills."""
        return next((layout for layout in self.layouts if layout.files[0].urls), self.layouts[0])

    @property
    def download_size(self) -> int:
        """Bytes to download, as far as they are known; 0 for a packaged set."""
        return 0 if self.packaged else sum(file.size or 0 for file in self.source.files)


@dataclass(frozen=True, kw_only=True)
class DatasetInfo(Entry[Sets]):
    """What is known of a data set without loading it.

    Attributes, besides those of `Entry`:
        input_shape: (C, H, W) of one sample.
        samples: number of training and of test samples.
        mean, std, class_names, validation, augmentation: as in `Dataset`.
    """

    input_shape: tuple[int, ...]
    samples: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    validation: int
    augmentation: str = "none"

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def size(self) -> str:
        """How much there is of it, for a table."""
        return "{} + {}".format(*self.samples)

    @property
    def shape(self) -> str:
        """The shape of one sample, for a table."""
        return "x".join(map(str, self.input_shape))


@dataclass(frozen=True, kw_only=True)
class GraphInfo(Entry[RawGraph]):
    """What is known of a graph without loading it; counts as in torch_geometric's tables.

    Attributes, besides those of `Entry`:
        nodes: number of nodes.
        edges: number of directed edges: every edge counts twice.
        features: number of features of a node.
        classes: number of classes of nodes.
        public: whether it comes with a published split.
    """

    nodes: int
    edges: int
    features: int
    classes: int
    public: bool = False

    @property
    def size(self) -> str:
        """How much there is of it, for a table."""
        return f"{self.nodes} nodes, {self.edges} edges"

    @property
    def shape(self) -> str:
        """The features of one node, for a table."""
        return str(self.features)


def _hosted(hosts: tuple[str, ...], name: str, checksum: str, size: int | None = None, content: str = "") -> File:
    return File(name, checksum, content, size, tuple(host + name for host in hosts))


def _idx_layouts(folders: tuple[str, ...], files: tuple[File, ...]) -> tuple[Layout[Sets], ...]:
    """Four idx files, in the order training images, training labels, test images, test labels."""

    def read(folder: Path) -> Sets:
        images, labels, test_images, test_labels = (readers.read_idx(file.find(folder)) for file in files)
        return (images[:, None], labels.astype("int64")), (test_images[:, None], test_labels.astype("int64"))

    return tuple(Layout(folder, files, read) for folder in folders)


def _usps_layout(folder: str, files: tuple[File, ...]) -> Layout[Sets]:
    def read(folder: Path) -> Sets:
        train, test = (readers.read_usps(file.find(folder)) for file in files)
        return train, test

    return Layout(folder, files, read)


def _svhn_layout(folder: str) -> Layout[Sets]:
    def read(folder: Path) -> Sets:
        train, test = (readers.read_svhn(file.find(folder)) for file in _SVHN_FILES)
        return train, test

    return Layout(folder, _SVHN_FILES, read)


def _planetoid_layout(name: str, files: tuple[tuple[str, str, int], ...]) -> Layout[RawGraph]:
    """Planetoid's raw folder, as torch_geometric's class lays it out; `files` are (suffix, sha256, size)."""
    hosted = tuple(
        _hosted(_PLANETOID_HOST, f"ind.{name.lower()}.{suffix}", f"sha256:{digest}", size)
        for suffix, digest, size in files
    )
    return Layout(f"planetoid/{name}/raw", hosted, partial(graph_readers.read_planetoid, name=name))


def _npz_layout(folder: str, host: str, name: str) -> Layout[RawGraph]:
    """A raw folder of torch_geometric's classes CitationFull and Amazon."""
    return Layout(folder, (_hosted((host,), name, ""),), partial(graph_readers.read_citation_npz, name=name))


_FASHION_CITATION = "H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST. arXiv:1708.07747, 2017"
_FASHION_CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR_HOST = ("https://www.cs.toronto.edu/~kriz/",)
_CIFAR_CITATION = "A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images. Technical report, 2009"
_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
    dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
    leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
    otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
    road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
_MNIST_HOSTS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_FASHION_HOST = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)
_USPS_HOSTS = (
    "https://web.stanford.edu/~hastie/ElemStatLearn/datasets/",
    "https://hastie.su.domains/ElemStatLearn/datasets/",
)

_MNIST_FILES = (
    _hosted(
        _MNIST_HOSTS,
        "train-images-idx3-ubyte.gz",
        "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        9_912_422,
        "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    _hosted(
        _MNIST_HOSTS,
        "train-labels-idx1-ubyte.gz",
        "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        28_881,
        "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    _hosted(
        _MNIST_HOSTS,
        "t10k-images-idx3-ubyte.gz",
        "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        1_648_877,
        "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    _hosted(
        _MNIST_HOSTS,
        "t10k-labels-idx1-ubyte.gz",
        "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        4_542,
        "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)
_FASHION_FILES = (
    _hosted(
        _FASHION_HOST,
        "train-images-idx3-ubyte.gz",
        "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        26_421_880,
        "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    _hosted(
        _FASHION_HOST,
        "train-labels-idx1-ubyte.gz",
        "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        29_515,
        "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    _hosted(
        _FASHION_HOST,
        "t10k-images-idx3-ubyte.gz",
        "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        4_422_102,
        "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    _hosted(
        _FASHION_HOST,
        "t10k-labels-idx1-ubyte.gz",
        "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        5_148,
        "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)
_USPS_FILES = (
    _hosted(
        _USPS_HOSTS,
        "zip.train.gz",
        "sha256:66ebf231ab51f2cf6ac1a892d0f98ccffee1079d7a5db638c1f11f366046ca16",
        1_829_071,
        "sha256:abc9f5c75b997cabe66b5d01727d5a681c69298e1641a8d37b55433a52129dc0",
    ),
    _hosted(
        _USPS_HOSTS,
        "zip.test.gz",
        "sha256:8dacc3c6e136af6c3488de9e5113a7daf140c8c2f1f0b61c54ee02f03f1a962f",
        439_208,
        "sha256:6bde17b4f1cd68e0630cd2751d6495b5795d9165ab2dc4a0be8b7002b732f4cc",
    ),
)
_SVHN_HOST = ("http://ufldl.stanford.edu/housenumbers/",)
_SVHN_FILES = (
    _hosted(_SVHN_HOST, "train_32x32.mat", "md5:e26dedcc434d2e4c54c9b2d4a06d8373", 182_040_794),
    _hosted(_SVHN_HOST, "test_32x32.mat", "md5:eb5a983be6a315427106f1b164d9cef3", 64_275_384),
)
_STL10_CLASSES = "airplane bird car cat deer dog horse monkey ship truck"
# Sums of archive and members as torchvision records them.
_STL10_LAYOUTS = (
    Layout(
        "stl10_binary",
        (
            File("train_X.bin", "md5:918c2871b30a85fa023e0c44e0bee87f", size=138_240_000),
            File("train_y.bin", "md5:5a34089d4802c674881badbb80307741", size=5_000),
            File("test_X.bin", "md5:7f263ba9f9e0b06b93213547f721ac82", size=221_184_000),
            File("test_y.bin", "md5:36f9794fa4beb8a2c72628de14fa638e", size=8_000),
        ),
        readers.read_stl10,
    ),
    Layout(
        "",
        (
            _hosted(
                ("http://ai.stanford.edu/~acoates/stl10/",),
                "stl10_binary.tar.gz",
                "md5:91f7769df0f17e558f3565bffb0c7dfb",
                2_640_397_119,
            ),
        ),
        readers.read_stl10,
    ),
)
# The members' sums are those of the published archives; CIFAR-100's binary members are not named by the
# authors, their sums were taken from the archive with the md5 below (Ruby's torchvision records them).
_CIFAR10_LAYOUTS = (
    Layout(
        "cifar-10-batches-bin",
        (
            File("data_batch_1.bin", "md5:5dd7e06a14cb22eb9f671a540d1b7c25", size=30_730_000),
            File("data_batch_2.bin", "md5:5ea93a67294ea407fff1d09f752e9692", size=30_730_000),
            File("data_batch_3.bin", "md5:942cd6a4bcdd0dd3c604fbe906cb4421", size=30_730_000),
            File("data_batch_4.bin", "md5:ae636b3ba5c66a11e91e8cb52e771fcb", size=30_730_000),
            File("data_batch_5.bin", "md5:53f37980c15c3d472c316c40844f3f0d", size=30_730_000),
            File("test_batch.bin", "md5:803d5f7f4d78ea53de84dbe85f74fb6d", size=30_730_000),
        ),
        partial(readers.read_cifar_binary, classes=10),
    ),
    Layout(
        "cifar-10-batches-py",
        (
            File("data_batch_1", "md5:c99cafc152244af753f735de768cd75f"),
            File("data_batch_2", "md5:d4bba439e000b95fd0a9bffe97cbabec"),
            File("data_batch_3", "md5:54ebc095f3ab1f0389bbae665268c751"),
            File("data_batch_4", "md5:634d18415352ddfa80567beed471001a"),
            File("data_batch_5", "md5:482c414d41f54cd18b22e5b47cb7c3cb"),
            File("test_batch", "md5:40351d587109b95175f43aff81a1287e"),
        ),
        partial(readers.read_cifar_python, classes=10),
    ),
    Layout(
        "",
        (
            _hosted(
                _CIFAR_HOST,
                "cifar-10-binary.tar.gz",
                "md5:c32a1d4ab5d03f1284b67883e8d87530",
                170_052_171,
            ),
        ),
        partial(readers.read_cifar_binary, classes=10),
    ),
    Layout(
        "",
        (File("cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a", size=170_498_071),),
        partial(readers.read_cifar_python, classes=10),
    ),
)
_CIFAR100_LAYOUTS = (
    Layout(
        "cifar-100-binary",
        (
            File(
                "train.bin",
                "sha256:f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
                size=153_700_000,
            ),
            File(
                "test.bin",
                "sha256:d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
                size=30_740_000,
            ),
        ),
        partial(readers.read_cifar_binary, classes=100),
    ),
    Layout(
        "cifar-100-python",
        (
            File("train", "md5:16019d7e3df5f24257cddd939b257f8d"),
            File("test", "md5:f0ef6b0ae62326f3e7ffdfab6717acfc"),
        ),
        partial(readers.read_cifar_python, classes=100),
    ),
    Layout(
        "",
        (
            _hosted(
                _CIFAR_HOST,
                "cifar-100-binary.tar.gz",
                "md5:03b5dce01913d631647c71ecec9e9cb8",
                168_513_733,
            ),
        ),
        partial(readers.read_cifar_binary, classes=100),
    ),
    Layout(
        "",
        (File("cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85", size=169_001_437),),
        partial(readers.read_cifar_python, classes=100),
    ),
)

_PLANETOID_HOST = ("https://github.com/kimiyoung/planetoid/raw/master/data/",)
_PLANETOID_CITATION = (
    "Z. Yang, W. Cohen, R. Salakhutdinov: Revisiting Semi-Supervised Learning with Graph Embeddings. ICML 2016"
)
_PLANETOID_HOMEPAGE = "https://github.com/kimiyoung/planetoid"
# The sums of the files whose git blob ids are those in kimiyoung/planetoid.
_CITESEER_FILES = (
    ("x", "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6", 31_087),
    ("tx", "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21", 260_321),
    ("allx", "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668", 595_021),
    ("y", "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924", 3_014),
    ("ty", "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce", 24_135),
    ("ally", "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95", 55_623),
    ("graph", "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7", 61_987),
    ("test.index", "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4", 5_000),
)
_PUBMED_FILES = (
    ("x", "fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33", 23_172),
    ("tx", "4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d", 405_505),
    ("allx", "508e538e2abdccdd54c4d3e9f49d638b4af7107d85845f66ddea5a5152658b7e", 7_578_385),
    ("y", "e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3", 854),
    ("ty", "ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd", 12_135),
    ("ally", "0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e", 224_739),
    ("graph", "5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9", 471_808),
    ("test.index", "b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5", 6_000),
)
_G2G_HOST = "https://github.com/abojchevski/graph2gauss/raw/master/data/"
_G2G_CITATION = "A. Bojchevski, S. Guennemann: Deep Gaussian Embedding of Graphs. ICLR 2018"
_G2G_HOMEPAGE = "https://github.com/abojchevski/graph2gauss"

DATASETS: dict[str, DatasetInfo | GraphInfo] = {
    entry.name: entry
    for entry in (
        DatasetInfo(
            name="digits",
            title="Optical digits",
            description="8x8 handwritten digits in 17 grey levels, shipped with bpfree",
            licence="CC BY 4.0",
            citation="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits. UCI, 1998",
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            input_shape=(1, 8, 8),
            samples=(1_437, 360),
            mean=(0.3054,),
            std=(0.3758,),
            class_names=tuple("0123456789"),
            validation=143,
            layouts=(
                Layout(
                    "",
                    (
                        File(
                            "digits.npz",
                            "sha256:7b327e5bd58e9859f805516c56e8286ba4017187ecf175d1236e2517b470e8c7",
                            size=47_512,
                        ),
                    ),
                    readers.read_npz,
                ),
            ),
            packaged=True,
        ),
        DatasetInfo(
            name="fashion-mini",
            title="Fashion-MNIST, first 4,000",
            description="the first 3,000 + 1,000 images of Fashion-MNIST, shipped with bpfree",
            licence="MIT",
            citation=_FASHION_CITATION,
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            input_shape=(1, 28, 28),
            samples=(3_000, 1_000),
            mean=(0.2845,),
            std=(0.3535,),
            class_names=tuple(_FASHION_CLASSES.split(",")),
            validation=300,
            layouts=(
                Layout(
                    "",
                    (
                        File(
                            "fashion-mini.npz",
                            "sha256:f9991b63a363798fa4e081aeed19230a4aa416ab59a1b7994f5aa9f1af23a4db",
                            size=1_755_144,
                        ),
                    ),
                    readers.read_npz,
                ),
            ),
            packaged=True,
        ),
        GraphInfo(
            name="cora",
            title="Cora",
            description="citations among papers on machine learning with the Planetoid split, shipped with bpfree",
            licence="MIT",
            citation=_PLANETOID_CITATION,
            homepage=_PLANETOID_HOMEPAGE,
            nodes=2_708,
            edges=10_556,
            features=1_433,
            classes=7,
            public=True,
            layouts=(
                Layout(
                    "",
                    (
                        File(
                            "cora.npz",
                            "sha256:e7e6b6929fd63cee6ed8d8833f61479ed27f591dcc5b829fd7c4adf3c1f62ae8",
                            size=89_796,
                        ),
                    ),
                    graph_readers.read_packaged_graph,
                ),
            ),
            packaged=True,
        ),
        DatasetInfo(
            name="mnist",
            title="MNIST",
            description="28x28 handwritten digits",
            licence="CC BY-SA 3.0",
            citation="Y. LeCun, C. Cortes, C. Burges: The MNIST database of handwritten digits. 1998",
            homepage="http://yann.lecun.com/exdb/mnist/",
            input_shape=(1, 28, 28),
            samples=(60_000, 10_000),
            mean=(0.1307,),
            std=(0.3081,),
            class_names=tuple("0123456789"),
            validation=10_000,
            layouts=_idx_layouts(("mnist", "MNIST/raw"), _MNIST_FILES),
        ),
        DatasetInfo(
            name="fashion_mnist",
            title="Fashion-MNIST",
            description="28x28 grey images of clothing",
            licence="MIT",
            citation=_FASHION_CITATION,
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            input_shape=(1, 28, 28),
            samples=(60_000, 10_000),
            mean=(0.2860,),
            std=(0.3530,),
            class_names=tuple(_FASHION_CLASSES.split(",")),
            validation=6_000,
            layouts=_idx_layouts(("fashion_mnist", "FashionMNIST/raw"), _FASHION_FILES),
            aliases=("fashion",),
        ),
        DatasetInfo(
            name="cifar10",
            title="CIFAR-10",
            description="32x32 colour photographs of 10 kinds of animals and vehicles",
            licence="none stated",
            citation=_CIFAR_CITATION,
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            input_shape=(3, 32, 32),
            samples=(50_000, 10_000),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            class_names=tuple(_CIFAR10_CLASSES.split()),
            validation=5_000,
            layouts=_CIFAR10_LAYOUTS,
            augmentation="crop-flip",
        ),
        DatasetInfo(
            name="cifar100",
            title="CIFAR-100",
            description="32x32 colour photographs of 100 kinds of things",
            licence="none stated",
            citation=_CIFAR_CITATION,
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            input_shape=(3, 32, 32),
            samples=(50_000, 10_000),
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            class_names=tuple(_CIFAR100_CLASSES.split()),
            validation=5_000,
            layouts=_CIFAR100_LAYOUTS,
            augmentation="crop-flip",
        ),
        DatasetInfo(
            name="usps",
            title="USPS",
            description="16x16 handwritten ZIP code digits with values in [-1, 1]",
            licence="none stated",
            citation="T. Hastie, R. Tibshirani, J. Friedman: The Elements of Statistical Learning. 2009",
            homepage="https://hastie.su.domains/ElemStatLearn/",
            input_shape=(1, 16, 16),
            samples=(7_291, 2_007),
            mean=(-0.4910,),
            std=(0.7692,),
            class_names=tuple("0123456789"),
            validation=729,
            layouts=(_usps_layout("usps", _USPS_FILES),),
        ),
        DatasetInfo(
            name="svhn",
            title="SVHN",
            description="32x32 colour photographs of house numbers, cropped to one digit",
            licence="for non-commercial use",
            citation="Y. Netzer and others: Reading Digits in Natural Images with Unsupervised Feature Learning. 2011",
            homepage="http://ufldl.stanford.edu/housenumbers",
            input_shape=(3, 32, 32),
            samples=(73_257, 26_032),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            class_names=tuple("0123456789"),
            validation=7_325,
            layouts=(_svhn_layout("svhn"), _svhn_layout("SVHN")),
            augmentation="shift",
        ),
        DatasetInfo(
            name="stl10",
            title="STL-10",
            description="96x96 colour photographs of ten kinds of things; the labelled ones",
            licence="none stated",
            citation="A. Coates, H. Lee, A. Ng: An Analysis of Single-Layer Networks. AISTATS 2011",
            homepage="https://cs.stanford.edu/~acoates/stl10",
            input_shape=(3, 96, 96),
            samples=(5_000, 8_000),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            class_names=tuple(_STL10_CLASSES.split()),
            validation=500,
            layouts=_STL10_LAYOUTS,
            augmentation="crop-flip",
        ),
        GraphInfo(
            name="citeseer",
            title="CiteSeer",
            description="citations among papers of six fields, with the Planetoid split",
            licence="MIT",
            citation=_PLANETOID_CITATION,
            homepage=_PLANETOID_HOMEPAGE,
            nodes=3_327,
            edges=9_104,
            features=3_703,
            classes=6,
            public=True,
            layouts=(_planetoid_layout("CiteSeer", _CITESEER_FILES),),
        ),
        GraphInfo(
            name="pubmed",
            title="PubMed",
            description="citations among papers on diabetes, with the Planetoid split",
            licence="MIT",
            citation=_PLANETOID_CITATION,
            homepage=_PLANETOID_HOMEPAGE,
            nodes=19_717,
            edges=88_648,
            features=500,
            classes=3,
            public=True,
            layouts=(_planetoid_layout("PubMed", _PUBMED_FILES),),
        ),
        GraphInfo(
            name="cora_ml",
            title="Cora-ML",
            description="citations among papers on machine learning, another extract than cora",
            licence="MIT",
            citation=_G2G_CITATION,
            homepage=_G2G_HOMEPAGE,
            nodes=2_995,
            edges=16_316,
            features=2_879,
            classes=7,
            layouts=(_npz_layout("citation_full/cora_ml/raw", _G2G_HOST, "cora_ml.npz"),),
            aliases=("citation_cora_ml",),
        ),
        GraphInfo(
            name="citeseer_full",
            title="CiteSeer (CitationFull)",
            description="citations among papers of six fields, another extract than citeseer",
            licence="MIT",
            citation=_G2G_CITATION,
            homepage=_G2G_HOMEPAGE,
            nodes=4_230,
            edges=10_674,
            features=602,
            classes=6,
            layouts=(_npz_layout("citation_full/citeseer/raw", _G2G_HOST, "citeseer.npz"),),
            aliases=("citation_citeseer",),
        ),
        GraphInfo(
            name="amazon_photo",
            title="Amazon Photo",
            description="photographic goods that are bought together, with words of their reviews",
            licence="MIT",
            citation="O. Shchur and others: Pitfalls of Graph Neural Network Evaluation. arXiv:1811.05868, 2018",
            homepage="https://github.com/shchur/gnn-benchmark",
            nodes=7_650,
            edges=238_162,
            features=745,
            classes=8,
            layouts=(
                _npz_layout(
                    "amazon/Photo/raw",
                    "https://github.com/shchur/gnn-benchmark/raw/master/data/npz/",
                    "amazon_electronics_photo.npz",
                ),
            ),
            aliases=("photo",),
        ),
        GraphInfo(
            name="github",
            title="GitHub (MUSAE)",
            description="developers who follow each other, for the web or for machine learning",
            licence="GPL-3.0",
            citation="B. Rozemberczki, C. Allen, R. Sarkar: Multi-scale Attributed Node Embedding. arXiv:1909.13021",
            homepage="https://github.com/benedekrozemberczki/MUSAE",
            nodes=37_700,
            edges=578_006,
            features=128,
            classes=2,
            layouts=(
                Layout(
                    "github/raw",
                    (_hosted(("https://graphmining.ai/datasets/ptg/",), "github.npz", ""),),
                    graph_readers.read_github,
                ),
            ),
        ),
    )
}
"""Every named data set, in the order in which they are listed: packaged ones first, then images, then graphs."""
