"""The composition of an agent: the one place that names its concrete parts and joins them."""

from __future__ import annotations

import asyncio
from datetime import datetime
from importlib.metadata import version

from agent.contract import topics
from agent.contract.manifest import Manifest
from agent.contract.messages import Boot, Presence
from agent.daemon.agent import Body
from agent.daemon.deployer import Deployer
from agent.daemon.monitor import Monitor
from agent.daemon.reporter import Identity as Reporting
from agent.daemon.reporter import Reporter
from agent.daemon.sharing import Sharing
from agent.daemon.state import AgentState
from agent.daemon.steps import StepParts, Steps
from agent.daemon.stick import StickLink, Sticks
from agent.endpoint import ApiKey, EndpointConfig, EndpointServer, FinishedRequest, Limits, Strictness
from agent.endpoint.openai.chat import render
from agent.link import LinkSettings, MqttLink
from agent.link.settings import Will
from agent.platform import facts
from agent.platform.clock import SystemClock
from agent.platform.resources import available_bytes
from agent.runtimes.host.model_host import WorkerHost
from agent.runtimes.host.settings import HostEvent, HostSettings
from agent.settings import AgentSettings
from agent.store.artifacts import ArtifactStore
from agent.store.boots import next_boot
from agent.store.fetch import Fetcher, OwnLimits
from agent.store.journal import FileJournal
from agent.trust.client import TrustClient
from agent.trust.identity import Identity
from agent.trust.renewal import CertificateRenewal


def compose(settings: AgentSettings, who: Identity) -> Body:
    """Return an agent of the real parts."""
    state = AgentState()
    host_events: asyncio.Queue[HostEvent] = asyncio.Queue()
    boot = next_boot(settings.state_dir, SystemClock().now())
    network = MqttLink(_link_settings(settings, who, boot))
    link = StickLink(network, who.device)
    trust = TrustClient(who, link, SystemClock())
    clock = trust.clock
    store = ArtifactStore(settings.state_dir)
    host = WorkerHost(render, host_settings(settings), on_event=host_events.put_nowait)
    monitor = Monitor(host, clock, _render_prompt, lambda: host.stats().memory_bytes)
    reporter = Reporter(
        Reporting(who.device, who.profile, version("phifleet"), boot),
        state,
        link,
        clock,
        host.active,
        lambda found: facts.collect(
            who.device, who.profile, version("phifleet"), settings.state_dir, found, clock.now()
        ).model_copy(update={"certificate_expires_at": state.certificate_expires_at}),
        trust.dialect,
    )

    def certificate_ends(at: datetime) -> None:
        state.certificate_expires_at = at

    renewal = CertificateRenewal(who, network, clock, certificate_ends)
    parts = StepParts(
        trust,
        store,
        Fetcher(
            link,
            store,
            who.device,
            dialect=trust.dialect,
            own=OwnLimits(settings.download_bytes_per_s, settings.metered_bytes, settings.mirrors),
        ),
        host,
        monitor,
        clock,
        available_bytes,
        linked=lambda: link.connected,
        at_hand=lambda: link.stick is not None,
    )
    steps = Steps(parts, reporter.progress)
    deployer = Deployer(steps, parts, FileJournal(settings.state_dir / "journal"), state, reporter.report)
    server = EndpointServer(
        host,
        endpoint_config(settings),
        stats=host.stats,
        on_finished=lambda done: _book(done, monitor),
        names=lambda: state.deployment.names(clock.now()),
    )
    share = Sharing(store, settings.share_host, settings.share_port).run if settings.share_host else None
    return Body(
        link,
        server,
        host,
        deployer,
        monitor,
        reporter,
        state,
        host_events,
        restarts=lambda: host.stats().restarts,
        state_dir=settings.state_dir,
        health_interval_s=settings.health_interval_s,
        canary_interval_s=settings.canary_interval_s,
        renew_certificate=renewal.run,
        share=share,
        sticks=Sticks(link, state, reporter, clock, certificate=who.certificate, private_key=who.private_key),
    )


def _book(done: FinishedRequest, monitor: Monitor) -> None:
    monitor.request_ended(
        done.digest, done.error, ttft_ms=done.ttft_ms, tpot_ms=done.tpot_ms, tokens=done.completion_tokens
    )


def _render_prompt(manifest: Manifest, prompt: str) -> str:
    return render(manifest, [{"role": "user", "content": prompt}])


def _link_settings(settings: AgentSettings, who: Identity, boot: Boot) -> LinkSettings:
    will = Presence(device=who.device, boot=boot, online=False, agent_version=version("phifleet"))
    return LinkSettings(
        url=settings.broker or who.broker,
        client_id=topics.client_id(who.device, boot.id),
        ca_file=who.broker_ca,
        cert_file=who.certificate,
        key_file=who.private_key,
        proxy=settings.broker_proxy.get_secret_value() if settings.broker_proxy else None,
        alpn=settings.broker_alpn,
        will=Will(topics.presence(who.device), will.to_json()),
        repeat_retained=True,  # these topics are this device's alone
    )


def host_settings(settings: AgentSettings) -> HostSettings:
    """Return the model host's part of the settings."""
    return HostSettings(
        load_timeout_s=settings.load_timeout_s,
        hang_s=settings.hang_timeout_s,
        queue_limit=settings.queue_limit,
        threads=settings.threads or 0,
        memory_limit_bytes=settings.memory_limit_bytes or 0,
        cache_file=settings.state_dir / "runtimes.json",
    )


def endpoint_config(settings: AgentSettings) -> EndpointConfig:
    """Return the endpoint's part of the settings."""
    keys = tuple(
        ApiKey(key.name, key.secret.get_secret_value(), key.requests_per_minute, key.concurrent)
        for key in settings.api_keys
    )
    return EndpointConfig(
        host=settings.host,
        port=settings.port,
        unix_socket=settings.unix_socket,
        keys=keys,
        cors_origins=settings.cors_origins,
        allowed_hosts=settings.allowed_hosts,
        unknown_parameters=Strictness(settings.unknown_parameters),
        tls_cert=settings.tls_cert,
        tls_key=settings.tls_key,
        allow_plain_http=settings.allow_plain_http,
        limits=Limits(request_timeout_s=settings.request_timeout_s),
    )
