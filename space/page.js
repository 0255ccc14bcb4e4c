// What only the browser can do: play the video, open the camera, and say at each tick what is to be seen now.
() => {
  const MOST = 16; // Frames of the camera that wait for the next tick; older ones are dropped, and counted.
  const page = { frames: [], dropped: 0, jump: null, url: null, capture: null, begun: 0, turn: 0 };
  window.page = page;
  const stage = () => document.querySelector("#stage");
  const player = () => document.querySelector("#player");
  const say = (text) => { document.querySelector("#notice").textContent = text; };

  const shape = () => {
    const video = player();
    if (video.videoWidth) stage().style.setProperty("--ratio", video.videoWidth / video.videoHeight);
  };

  const stop = () => {
    clearInterval(page.capture);
    page.capture = null;
    const video = player();
    if (video.srcObject) video.srcObject.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    page.frames = [];
    page.dropped = 0;
    page.jump = null;
    page.url = null;
  };

  // A file: the server reads it, and is told at each tick how far the browser has played.
  page.play = (url) => {
    if (!url) return;
    page.turn += 1;
    stop();
    say("");
    const video = player();
    let loaded = false;
    video.onloadeddata = () => { loaded = true; };
    video.onresize = shape;
    // Noted where the person jumps to: by the next tick more of it has been played.
    video.onseeking = () => { if (page.url && loaded) page.jump = video.currentTime; };
    video.onerror = () => { if (page.url) say("This browser cannot play this file. Use an mp4 with H.264, or webm."); };
    page.url = url;
    video.controls = true;
    video.src = url;
    stage().classList.add("playing");
    video.play().catch((error) => { if (error.name === "NotAllowedError") say("Press play to begin."); });
  };

  // The camera: frames are taken at the chosen rate and sent with the next tick. Says whether it was granted.
  page.camera = async (fps) => {
    if (!navigator.mediaDevices) {
      say("A camera needs a page over https, or one on this machine.");
      return false;
    }
    const turn = ++page.turn;
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: { ideal: "environment" } }, audio: false });
    } catch (error) {
      say(`The camera cannot be opened (${error.name}). Allow it for this page, or choose a video.`);
      return false;
    }
    if (turn !== page.turn) {
      // Something else was begun while the person was asked.
      stream.getTracks().forEach((track) => track.stop());
      return false;
    }
    stop();
    say("");
    const video = player();
    video.removeAttribute("src");
    video.controls = false;
    video.onresize = shape;
    video.srcObject = stream;
    stage().classList.add("playing");
    await video.play();
    page.begun = performance.now();
    page.watchAt(fps);
    return true;
  };

  page.watchAt = (fps) => {
    const video = player();
    const canvas = document.createElement("canvas");
    clearInterval(page.capture);
    page.capture = setInterval(() => {
      if (video.paused || !video.videoWidth) return;
      const scale = Math.min(1, 512 / Math.max(video.videoWidth, video.videoHeight));
      canvas.width = Math.round(video.videoWidth * scale);
      canvas.height = Math.round(video.videoHeight * scale);
      canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
      const time = Math.round(performance.now() - page.begun) / 1000;
      page.frames.push({ time, image: canvas.toDataURL("image/jpeg", 0.92) });
      if (page.frames.length > MOST) { page.frames.shift(); page.dropped += 1; }
    }, 1000 / fps);
  };

  page.pause = () => {
    const video = player();
    if (video.paused) video.play(); else video.pause();
  };

  // The second from which a stream begins anew; the camera is from now on watched at this rate.
  page.now = (fps) => {
    const video = player();
    if (page.capture) page.watchAt(fps);
    if (page.url && video.ended) {
      video.currentTime = 0;
      video.play();
      return 0;
    }
    return page.url ? video.currentTime : null;
  };

  // What is sent at a tick: frames of the camera, how many were dropped, the second that is played, and the second that
  // the person jumped to, if there was a jump.
  page.collect = () => {
    const { frames, dropped, jump } = page;
    page.frames = [];
    page.dropped = 0;
    const video = player();
    const until = page.url ? video.currentTime + (video.ended ? 1 : 0) : null;
    // Where a jump has not arrived yet, the second is not the one that will be shown.
    if (jump !== null && video.seeking) return [[], 0, null, null];
    page.jump = null;
    return [frames, dropped, until, jump];
  };

  // Captions are what is announced; the chat repeats them.
  const quiet = setInterval(() => {
    const log = document.querySelector("#chat [aria-live]");
    if (log) { log.setAttribute("aria-live", "off"); clearInterval(quiet); }
  }, 500);
}
