//! What an image says of itself: index, manifest and configuration, of OCI or as `docker save` writes them.

use serde::{Deserialize, de::DeserializeOwned};

use super::{
    OciError,
    blob::{Blob, Digest, Source},
};

/// The longest document, as registries have it.
const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
/// Indexes in indexes.
const MAX_DEPTH: usize = 4;
/// More layers than any builder makes.
const MAX_LAYERS: usize = 256;
const INDEX: &str = "index.json";
const SAVED: &str = "manifest.json";
/// The name that a tool gave an image in a layout, and the longer one that others do.
const NAMES: [&str; 2] = ["org.opencontainers.image.ref.name", "io.containerd.image.name"];

/// What names a piece of an image.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<serde_json::Map<String, serde_json::Value>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// An image as `docker save` lists it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// An image's configuration.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<Process>,
    #[serde(default)]
    rootfs: Option<RootFs>,
}

#[derive(Debug, Default, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

/// What a container of the image would run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Process {
    /// As whom: a name or a number, and perhaps a group behind a colon.
    pub user: Option<String>,
    /// `NAME=VALUE`, each.
    pub env: Option<Vec<String>>,
    /// The program and its first words.
    pub entrypoint: Option<Vec<String>>,
    /// The words behind.
    pub cmd: Option<Vec<String>>,
    /// Where.
    pub working_dir: Option<String>,
}

/// A layer, before it is looked at.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) blob: Blob,
    /// Of the blob.
    pub(super) digest: Option<Digest>,
    /// Of what is in it, unpacked.
    pub(super) content: Option<Digest>,
}

/// What an image consists of.
#[derive(Debug)]
pub(super) struct Parts {
    /// Of the configuration, which names all content: what others call the image's id.
    pub(super) id: Digest,
    pub(super) process: Process,
    pub(super) layers: Vec<Layer>,
}

/// The host's architecture, as images name it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The image in a source, or that of its images which has this name, for this host.
pub(super) fn choose(source: &Source, name: Option<&str>) -> Result<Parts, OciError> {
    if let Some(index) = source.find(INDEX)? {
        let index: Index = parse(INDEX, &index.read(MAX_DOCUMENT_BYTES, None)?)?;
        let manifest = manifest(source, &named(index.manifests, name)?)?;
        return of_manifest(source, manifest);
    }
    let Some(saved) = source.find(SAVED)? else { return Err(OciError::NotOci) };
    let saved: Vec<Saved> = parse(SAVED, &saved.read(MAX_DOCUMENT_BYTES, None)?)?;
    of_saved(source, &saved, name)
}

/// The manifests of an index among which this host's is: all of one image, or of the one that is named.
fn named(mut manifests: Vec<Descriptor>, name: Option<&str>) -> Result<Vec<Descriptor>, OciError> {
    let there: Vec<_> = manifests.iter().flat_map(names_of).map(str::to_owned).collect();
    if let Some(name) = name {
        manifests.retain(|descriptor| names_of(descriptor).any(|own| is_name(own, name)));
        if manifests.is_empty() {
            return Err(OciError::Name { name: name.to_owned(), there: list(&there) });
        }
        return Ok(manifests);
    }
    // Several names may be those of one image. Those without a name are kinds of one.
    let mut digests: Vec<_> = manifests
        .iter()
        .filter(|d| names_of(d).next().is_some())
        .map(|d| d.digest.bytes())
        .collect();
    digests.sort_unstable();
    digests.dedup();
    if digests.len() > 1 {
        return Err(OciError::Several(list(&there)));
    }
    Ok(manifests)
}

fn names_of(descriptor: &Descriptor) -> impl Iterator<Item = &str> {
    let annotations = descriptor.annotations.as_ref();
    NAMES.into_iter().filter_map(move |key| annotations?.get(key)?.as_str())
}

/// Whether an image is meant: by its name, or by what stands behind the colon.
fn is_name(own: &str, wanted: &str) -> bool {
    own == wanted || own.rsplit_once(':').is_some_and(|(_, tag)| tag == wanted)
}

fn list(names: &[String]) -> String {
    let shown: Vec<String> =
        names.iter().take(8).map(|name| name.chars().take(80).collect()).collect();
    if shown.is_empty() { "none".into() } else { shown.join(", ") }
}

/// The manifest for this host, through indexes in indexes.
fn manifest(source: &Source, descriptors: &[Descriptor]) -> Result<Manifest, OciError> {
    let mut descriptors = descriptors.to_vec();
    for _ in 0..MAX_DEPTH {
        let chosen = for_this_host(&descriptors)?;
        let blob = source.blob(chosen.digest, chosen.size)?;
        let name = chosen.digest.to_string();
        let content = blob.read(MAX_DOCUMENT_BYTES, Some(chosen.digest))?;
        if !chosen.media_type.contains("index") && !chosen.media_type.contains("manifest.list") {
            return parse(&name, &content);
        }
        descriptors = parse::<Index>(&name, &content)?.manifests;
    }
    Err(OciError::Depth)
}

/// The first that runs here: of several variants the plainest. One that does not say where it runs may run here.
fn for_this_host(descriptors: &[Descriptor]) -> Result<&Descriptor, OciError> {
    let rank = |descriptor: &Descriptor| match &descriptor.platform {
        None => Some(2),
        Some(platform) if platform.os != "linux" || platform.architecture != architecture() => None,
        Some(Platform { variant: Some(variant), .. }) if variant != "v1" => Some(1),
        Some(_) => Some(0),
    };
    let ranked = descriptors.iter().filter_map(|descriptor| Some((rank(descriptor)?, descriptor)));
    ranked.min_by_key(|(rank, _)| *rank).map(|(_, descriptor)| descriptor).ok_or_else(|| {
        let there: Vec<_> = descriptors
            .iter()
            .filter_map(|descriptor| descriptor.platform.as_ref())
            .map(|platform| format!("{}/{}", platform.os, platform.architecture))
            .collect();
        OciError::Platform { wanted: architecture(), there: list(&there) }
    })
}

fn of_manifest(source: &Source, manifest: Manifest) -> Result<Parts, OciError> {
    let Descriptor { digest: id, size, .. } = manifest.config;
    let config = source.blob(id, size)?.read(MAX_DOCUMENT_BYTES, Some(id))?;
    let (process, contents) = config_of(&id.to_string(), &config)?;
    check_count(manifest.layers.len(), &contents)?;
    let mut contents = contents.into_iter();
    let layers = manifest.layers.into_iter().map(|layer| {
        if !is_layer(&layer.media_type) {
            return Err(OciError::LayerType(layer.media_type));
        }
        let blob = source.blob(layer.digest, layer.size)?;
        Ok(Layer { blob, digest: Some(layer.digest), content: contents.next() })
    });
    Ok(Parts { id, process, layers: layers.collect::<Result<_, _>>()? })
}

fn of_saved(source: &Source, saved: &[Saved], name: Option<&str>) -> Result<Parts, OciError> {
    let tags = |saved: &Saved| saved.repo_tags.clone().unwrap_or_default();
    let there: Vec<_> = saved.iter().flat_map(tags).collect();
    let image = match (name, saved) {
        (None, [one]) => Some(one),
        (None, _) => return Err(OciError::Several(list(&there))),
        (Some(name), _) => {
            saved.iter().find(|saved| tags(saved).iter().any(|own| is_name(own, name)))
        }
    };
    let none = || OciError::Name { name: name.unwrap_or_default().to_owned(), there: list(&there) };
    let image = image.ok_or_else(none)?;
    let part = |name: &str| {
        source.find(name)?.ok_or_else(|| OciError::Missing(name.chars().take(80).collect()))
    };
    let config = part(&image.config)?.read(MAX_DOCUMENT_BYTES, None)?;
    let (process, contents) = config_of(&image.config, &config)?;
    check_count(image.layers.len(), &contents)?;
    if contents.is_empty() && !image.layers.is_empty() {
        // The only digests that there are.
        return Err(OciError::Count { layers: image.layers.len(), contents: 0 });
    }
    let mut contents = contents.into_iter();
    let layers = image.layers.iter().map(|name| {
        let (blob, content) = (part(name)?, contents.next());
        Ok(Layer { blob, digest: None, content })
    });
    let layers = layers.collect::<Result<_, OciError>>()?;
    Ok(Parts { id: Digest::of(&config), process, layers })
}

fn config_of(name: &str, content: &[u8]) -> Result<(Process, Vec<Digest>), OciError> {
    let config: Config = parse(name, content)?;
    let is_other = |own: &str, wanted| !own.is_empty() && own != wanted;
    if is_other(&config.architecture, architecture()) || is_other(&config.os, "linux") {
        let there = list(&[format!("{}/{}", config.os, config.architecture)]);
        return Err(OciError::Platform { wanted: architecture(), there });
    }
    Ok((config.config.unwrap_or_default(), config.rootfs.unwrap_or_default().diff_ids))
}

/// Either the contents of all layers are said, or of none.
fn check_count(layers: usize, contents: &[Digest]) -> Result<(), OciError> {
    match contents.len() {
        _ if layers > MAX_LAYERS => Err(OciError::Layers),
        0 => Ok(()),
        contents if contents == layers => Ok(()),
        contents => Err(OciError::Count { layers, contents }),
    }
}

/// Whether that is a layer of files that is not encrypted. How it is packed, its own bytes say.
fn is_layer(media_type: &str) -> bool {
    let is_of_files = [".layer.", ".rootfs."].iter().any(|word| media_type.contains(word));
    let kind = media_type.rsplit_once(".tar").map(|(_, packing)| packing);
    is_of_files && matches!(kind, Some("" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
}

fn parse<T: DeserializeOwned>(name: &str, content: &[u8]) -> Result<T, OciError> {
    serde_json::from_slice(content)
        .map_err(|error| OciError::Json { name: name.chars().take(80).collect(), error })
}
